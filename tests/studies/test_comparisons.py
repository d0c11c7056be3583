"""What finished sweeps say, worked out by hand."""

import pandas as pd
import pytest

from lib.errors import EditError
from lib.show import tables
from lib.studies import comparisons


class Reported(dict):
    """Stands for `Results`: what is reported, without its format."""

    def many(self, values):
        self.update({key: value[0] if isinstance(value, tuple) else value for key, value in values.items()})

    def __call__(self, key, value, form=""):
        self[key] = value

    table = __call__


def runs(**columns):
    base = {"pathway": "v_only", "seed": 0, "reached": True, "steps": 10, "kl": 0.1, "bled": 0, "bled_n": 9}
    base |= {"facts_told": 8, "held_out_repaired": 0, "held_out_n": 19, "capability_lost": 0, "unrelated_lost": 0}
    return pd.DataFrame({"layer": columns["layer"]}).assign(**base | columns)


def test_correlations_worked_out():
    """Layers 1 to 4 in the order of their score: told falls, steps fall (which is better), bled is constant."""
    means = comparisons.by_layer(runs(layer=[1, 2, 3, 4], facts_told=[8, 7, 6, 5], steps=[40, 30, 20, 10]))
    scores = pd.DataFrame({"layer": [1, 2, 3, 4], "score": [0.1, 0.2, 0.3, 0.4]})
    found = comparisons.correlations(means, scores).set_index("measure")
    assert found.rho["facts_told"] == -1 and found.rho["steps"] == 1
    assert found.low["facts_told"] == -1 and found.high["facts_told"] == -1
    assert found.rho.isna()["bled"] and (found.layers == 4).all()


def test_other_layers_that_do_as_well_are_counted():
    swept = runs(layer=[1, 2, 3], facts_told=[8, 8, 7], steps=[5, 20, 1], held_out_repaired=[3, 0, 5])
    means = comparisons.by_layer(swept.assign(kl=[0.2, 0.1, 0.0]))
    (row,) = comparisons.other_layers(means, 2).to_dict("records")
    assert (row["others"], row["told"], row["repaired"], row["sooner"], row["gentler"]) == (2, 1, 2, 1, 0)
    assert row["as_well"] == 1 and row["best_layer"] == 3 and row["most_repaired"] == 5
    with pytest.raises(EditError, match="no edit at the diagnosed layer 4"):
        comparisons.other_layers(means, 4)


def test_pathways_that_were_not_tried_everywhere_are_no_comparison():
    full = runs(layer=[1, 2, 3], facts_told=[8, 8, 7], held_out_repaired=[3, 1, 5])
    few = runs(layer=[1, 3], facts_told=[8, 8], held_out_repaired=[9, 9]).assign(pathway="ffn")
    means = comparisons.by_layer(pd.concat([full, few]))
    assert set(comparisons.other_layers(means, 2).pathway) == set(full.pathway)
    assert comparisons.by_depth(means).repaired_max.tolist() == [3, 1, 5]


def test_a_sink_stands_among_the_rivals_by_the_run_of_its_first_seed_on_the_eight():
    rivals = pd.DataFrame([{"name": "vector", "rival": "bias vector", "held_out_repaired": 0, "held_out_n": 19}])
    base = {"case": 1, "pathway": "sink_kv", "facts": "eight", "variant": "true", "steps": 60, "rate": 0.01, "seed": 3}
    runs = [base, base | {"seed": 4}, base | {"variant": "false"}, base | {"facts": "fit"}, base | {"case": 2}]
    runs += [base | {"steps": 0}, base | {"pathway": "v_only"}]
    repairs = pd.DataFrame(runs).assign(repaired=range(7), untold=19, parameters=1)
    both = comparisons.with_sinks(rivals, repairs)
    assert both.to_dict("list") == {
        "name": ["vector", "sink_kv"],
        "rival": ["bias vector", "sink kv"],
        "held_out_repaired": [0, 0],
        "held_out_n": [19, 19],
    }
    assert comparisons.with_sinks(rivals, repairs.tail(1)) is rivals
    larger, none = repairs.head(1).assign(parameters=2), pd.DataFrame()
    pair = pd.concat([larger, larger.assign(pathway="sink_token", parameters=1)])
    assert comparisons.sinks(pair).pathway.tolist() == ["sink_token", "sink_kv"], "the fewest parameters first"
    for name in ("sinks", "sinks_effects"):
        assert tables.arranged(name, comparisons.sinks(none)).empty, "a chapter that has no record says nothing"
    table = comparisons.with_sinks(rivals, repairs.assign(repaired=range(5, 12)))
    assert table.held_out_repaired.tolist() == [0, 5]


def test_a_diverged_run_tells_nothing():
    means = comparisons.by_layer(runs(layer=[1, 1], facts_told=[8, None], reached=[True, False]))
    assert means.facts_told.tolist() == [4.0] and means.reached.tolist() == [0.5]


def test_where_there_is_one_group_of_values_none_is_drawn_beside_it():
    table = pd.DataFrame({"pick": ["diagnosed", "random"] * 2, "part": ["head"] * 2 + ["values"] * 2})
    table = table.assign(facts_told=8, parameters=5, facts_n=8, held_out_repaired=1, min_margin=0.1, kl=0.1)
    assert list(comparisons.random_parts(table).part) == ["head", "values"]
    assert list(comparisons.random_parts(table, n_kv_heads=1).part) == ["head"]


def test_random_parts_beside_the_diagnosed_one():
    table = pd.DataFrame({"pick": ["diagnosed", "random", "random"], "facts_told": [7, 8, 7]})
    table = table.assign(part="head", parameters=5, facts_n=8, held_out_repaired=[1, 0, 2])
    table = table.assign(min_margin=[-0.1, 0.2, -0.2], kl=[0.1, 0.2, 0.4])
    (row,) = comparisons.random_parts(table).to_dict("records")
    assert row["better"] == 1 and row["random"] == 2 and row["random_told"] == 7.5


def test_seeds_of_both_sweeps_are_joined_and_none_counts_twice():
    swept = runs(layer=[2, 4, 6], held_out_repaired=[1, 5, 9])
    near = runs(layer=[3, 4, 4], seed=[1, 0, 1], held_out_repaired=[7, 5, 2]).rename(columns={"layer": "at"})
    found = comparisons.spread(swept, near.assign(distance=[-1, 0, 0])).set_index("layer")
    assert found.index.tolist() == [3, 4] and found.seeds.tolist() == [1, 2]
    assert (found.repaired_min[4], found.repaired_max[4]) == (2, 5)


def rivals(*names, **columns):
    """The table of rivals that are called by the first letters of their names."""
    base = {"held_out_n": 4, "facts_n": 2, "paraphrases_n": 3, "bled": 0, "ratio": 1.0, "seconds": 1.0}
    lost = ("neighbours", "working", "elsewhere", "capability", "unrelated", "relations")
    base |= dict.fromkeys((f"{kind}_lost" for kind in lost), 0) | {"relations_told": 1, "paraphrases_told": 1}
    base |= {"strength": "", "ratio_low": 0.9, "ratio_high": 1.1}
    table = pd.DataFrame({"name": names, "rival": [name[0].upper() for name in names]})
    return comparisons.rivals(table.assign(**base | columns))


def test_the_ladder_worked_out():
    """a prefix tells all; of what changes something, head does with one parameter, and only `full` generalises: two of
    four is half."""
    columns = {"parameters": [900, 0, 1, 30], "facts_told": [2, 2, 2, 1], "held_out_repaired": [2, 1, 0, 1]}
    columns |= {"working_lost": [0, 0, 3, 0], "neighbours_lost": [1, 0, 2, 0]}
    rows = rivals("full", "newline", "head", "lora", **columns)
    assert rows.rival.tolist() == ["N", "H", "L", "F"] and rows.local_lost.tolist() == [0, 5, 0, 1]
    assert rows.kind.tolist() == ["no training", "no training", "few parameters", "pathway"]
    steps = comparisons.ladder(rows)
    assert steps.loc["whole"].tolist() == ["N", "H (1)", "0"]
    assert steps.loc["general"].tolist() == ["none", "F (900)", "900"]
    said = Reported()
    comparisons.report_rivals(said, rows)
    assert said["rivals_told"] == 3 and said["rivals_untrained"] == "N; H" and said["most_general"] == "F"
    shown = tables.arranged("rivals", rows)
    assert shown["held-out told"].iloc[3] == "2 of 4 (7% to 93%)" and shown.locality.iloc[1] == "5 lost"


def test_where_nothing_generalises_the_ladder_says_none():
    steps = comparisons.ladder(rivals("lora", "full", parameters=[3, 9], facts_told=[1, 2], held_out_repaired=[1, 1]))
    assert steps.loc["general"].tolist() == ["none", "none", "none"] and steps.parameters["whole"] == "9"


def test_methods_with_equally_few_parameters_are_all_named():
    rows = rivals("head", "opponent", parameters=1, facts_told=2, held_out_repaired=4)
    assert comparisons.ladder(rows).changed["general"] == "H; O (1)"


def test_what_depth_does_worked_out():
    """Repairs fall and bleeding rises from layer to layer: the verdict names both ends and the correlations."""
    swept = runs(layer=[1, 2, 3, 4], held_out_repaired=[7, 5, 2, 0], bled=[1, 4, 6, 8])
    means = comparisons.by_layer(pd.concat([swept, swept.assign(pathway="full", held_out_repaired=1)]))
    table, said = comparisons.by_depth(means), Reported()
    assert table.repaired_mean.tolist() == [4.0, 3.0, 1.5, 0.5] and table.bled_max.tolist() == [1, 4, 6, 8]
    comparisons.report_depth(said, table, comparisons.depth_correlations(means))
    assert said["depth_verdict"].startswith("From L1 to L4 the held-out facts repaired go from 4.0 to 0.5 and")
    falls = (
        "Repairs against depth, rank correlation over layers: -1.00 to -1.00 by pathway, 0 of 1 intervals above zero"
    )
    assert f"{falls} and 1 below." in said["depth_verdict"] and "nan" not in said["depth_verdict"]
    assert "+1.00 by pathway, 2 of 2 intervals above zero" in said["depth_verdict"]


def test_a_query_that_training_cannot_mend_tells_nothing_of_the_query():
    said = Reported()
    planted = pd.DataFrame({"title": comparisons.BLIND_QUERY, "facts": 8, "told_before": 2}, index=range(3))
    planted = planted.assign(pathway=["k_only", "q_only", "v_only"], told_after=[8, 2, 2], untold=19, repaired=0)
    comparisons.report_control(said, planted)
    assert said["planted_query"] == {"facts": 8, "before": 2, "v_only": 2, "q_only": 2, "k_only": 8}
    assert "cannot be told" in said["q_side_verdict"] and "untold on 1 of 1" in said["q_side_verdict"]
    comparisons.report_control(said, planted.assign(told_after=8))
    assert "can repair a query" in said["q_side_verdict"]


def test_the_smallest_slice_is_no_minimum_where_less_tells_all():
    said = Reported()
    columns = {"parameters": [900, 30, 1], "facts_told": [2, 2, 1], "held_out_repaired": [1, 0, 0]}
    rows = rivals("v_only", "lora", "head", **columns)
    comparisons.report_rivals(said, rows)
    assert said["smaller_than_v_only"] == "L (30)" and said["fewest_parameters"] == 30
    means = comparisons.by_layer(runs(layer=[2, 4], held_out_repaired=[7, 1]))
    comparisons.report_rivals(said, rows, elsewhere=means)
    assert "the layer sweep above has 7 of 4 (L2, V-only)" in said["general_verdict"]
