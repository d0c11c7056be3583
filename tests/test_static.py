"""Input-free diagnostics: answers worked out by hand, and nulls that nulls must fail."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from lib import static
from lib.errors import DataError
from lib.facts import load_cases, load_facts
from lib.recall import scorable
from lib.sites import Site
from lib.static import RelationMap
from lib.weights import view
from tests.conftest import tiny_gpt2, tiny_llama, wrap


def test_top_dimensions():
    assert static.top_dimensions(768) == 100 and static.top_dimensions(576) == 96 and static.top_dimensions(120) == 20


def test_qk_overlap_by_hand():
    """Queries and keys of one head made to read the same dimensions, of another disjoint ones."""
    model = tiny_gpt2(n_embd=48, n_head=2)
    weights = view(model)
    k = static.top_dimensions(48)  # 8
    with torch.no_grad():
        attn = weights.blocks[0].attn
        attn.W_Q.zero_(), attn.W_K.zero_()
        attn.W_Q[0, :k], attn.W_K[0, :k] = 1.0, -2.0
        attn.W_Q[1, :k], attn.W_K[1, k : 2 * k] = 1.0, 1.0
        attn.W_K[1, : k // 2] = 3.0  # half of the query's dimensions are now the key's loudest
    overlap = static.qk_overlap(weights)
    assert overlap[0].tolist() == [1.0, 0.5]


def test_qk_overlap_folds_the_gain():
    model = tiny_gpt2(n_embd=48, n_head=2)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.copy_(torch.logspace(3, -3, 48))
    folded, bare = (static.qk_overlap(view(model), folded=f)[0] for f in (True, False))
    assert (folded == 1).all() and (bare < 0.6).all()


def test_random_heads_overlap_as_chance_says():
    mean, low, high = static.qk_overlap_chance(576)
    assert mean == pytest.approx(96 / 576)
    assert hypergeom(576, 96, 96).cdf(round(high * 96)) >= 0.975
    weights = view(tiny_llama(hidden_size=576, num_attention_heads=9, num_key_value_heads=9, num_hidden_layers=3))
    overlap = static.qk_overlap(weights)
    assert overlap.mean() == pytest.approx(mean, abs=0.03)
    assert ((overlap < low) | (overlap > high)).float().mean() < 0.2


def test_k_norm_by_hand(tiny):
    token, name = 1234, "ln_1" if tiny.module.config.model_type == "gpt2" else "input_layernorm"
    norms = static.k_norms_by_head(tiny.weights, [token])[..., 0]
    for layer, block in enumerate(tiny.weights.blocks):
        e = getattr(block.module, name)(tiny.module.get_input_embeddings()(torch.tensor(token)))
        norm = getattr(getattr(block.module, "self_attn", None), "k_norm", torch.nn.Identity())
        torch.testing.assert_close(norms[layer], torch.stack([norm(e @ W).norm() for W in block.attn.W_K]))


def test_k_norm_table_finds_the_loud_type_and_is_unsure_of_equals():
    weights = view(tiny_gpt2())
    with torch.no_grad():  # one type along a direction that every key reads strongly
        weights.W_E[:10] = torch.randn(32) * 5 + torch.randn(10, 32) * 0.01
        for block in weights.blocks:
            direction = block.norm_attn(weights.W_E[0])
            block.attn.W_K.add_(direction[None, :, None])
    table = static.k_norm_table(weights, {"loud": list(range(10)), "a": list(range(20, 60)), "b": list(range(60, 100))})
    assert static.loudest_type_by_layer(table) == ["loud"] * 3
    loud = table[table.type == "loud"]
    assert (loud.top_share == 1).all() and (loud.low <= loud["mean"]).all() and (loud["mean"] <= loud.high).all()


def test_relation_map_scores_by_hand():
    hits = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    hits[0, 0] = torch.eye(4, dtype=torch.bool)  # head 0: every answer, and no other
    hits[0, 1, :, 0] = True  # head 1: always the same answer
    relation = RelationMap(hits)
    assert relation.score.tolist() == [[1.0, 0.25]]
    null = relation.null(permutations=200)
    assert null[:, 0, 1].unique().tolist() == [0.25]  # naming one answer always is worth exactly chance
    assert null[:, 0, 0].mean() == pytest.approx(0.25, abs=0.05)
    p = relation.p_values(permutations=1000)
    assert p[0, 0] < 0.1 and p[0, 1] > 0.5


def test_joint_map_takes_the_best_and_pays_for_it():
    one, other = torch.zeros(1, 2, 6, 6, dtype=torch.bool), torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    one[0, 0], other[0, 1, :3, :3] = torch.eye(6, dtype=torch.bool), torch.eye(3, dtype=torch.bool)
    maps = [RelationMap(one), RelationMap(other)]
    joint = static.join(maps)
    assert joint.score.tolist() == [[1.0, 0.5]]
    assert joint.rank(Site(0, 1)) == 2
    assert (joint.p >= torch.stack([m.p_values() for m in maps]).amin(0)).all()


def test_a_dead_head_hits_nothing(smollm2):
    tiny = wrap(tiny_gpt2(n_embd=64, n_head=2, n_layer=2), smollm2.tokenizer)
    with torch.no_grad():
        tiny.weights.blocks[0].attn.W_V[1].zero_()
    assert static.relation_maps(tiny, load_facts("eight"))["raw"].score[0, 1] == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(20, 400), st.sampled_from([12, 50, 500]), st.booleans())
def test_an_answer_out_of_a_part_is_out_of_the_whole(monkeypatch, seed, vocabulary, part, coarse):
    """Most rows are settled by a part of the vocabulary: the same hits as from all of it, ties and dead rows too."""
    monkeypatch.setattr(static, "PART", part)
    generator = torch.Generator().manual_seed(seed)
    x, W_U = (torch.randn(shape, generator=generator) for shape in ((20, 6), (6, vocabulary)))
    if coarse:  # small whole numbers: many ties, and exact
        x, W_U = x.round(), W_U.round()
    x[3] = 0
    answers, logits = torch.randint(12, (5,), generator=generator), x @ W_U
    hits = static._in_top(x, W_U, answers)
    in_top = (logits[:, None] > logits[:, answers, None]).sum(-1) < static.TOP
    assert (hits == in_top & x.any(-1, keepdim=True)).all() and not hits[3].any()


def test_the_vocabulary_in_another_order(tiny):
    """The answers' tokens first, every token once, the others from the farthest from the mean."""
    answers = torch.tensor([700, 3, 3, 41])
    whole = tiny.weights.norm_final.fold(tiny.weights.W_U)
    vocabulary, places = static._outliers_first(tiny.weights, answers)
    assert vocabulary.shape == whole.shape and set(places.tolist()) == {0, 1, 2}
    torch.testing.assert_close(vocabulary[:, places], whole[:, answers])
    torch.testing.assert_close(vocabulary.double().sum(1), whole.double().sum(1), atol=1e-4, rtol=0)
    distance = (vocabulary[:, 3:] - whole.mean(1, keepdim=True)).norm(dim=0)
    assert (distance.diff() <= 1e-6).all() and distance[0] > distance[-1]


def test_copy_scores_are_those_of_all_logits(tiny):
    """Low rank and moments stand for every token's logit through the whole OV matrix."""
    weights, ids = tiny.weights, [5, 80, 300, 2000]
    attn = weights.blocks[1].attn
    W_V, moments = attn.per_head(attn.W_V), static._unembedding_moments(weights)
    x = weights.blocks[1].norm_attn(weights.W_E[ids])
    own, other = static._copy_scores(x @ W_V, attn.W_O, ids, moments)
    for head in range(weights.n_heads):
        logits = (x @ (W_V[head] @ attn.W_O[head]) @ moments[0]).double()
        z = ((logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0))[:, ids]
        torch.testing.assert_close(own[head].double(), z.diagonal(), rtol=1e-4, atol=1e-4)
        rest = (z.sum(1) - z.diagonal()) / (len(ids) - 1)
        torch.testing.assert_close(other[head].double(), rest, rtol=1e-4, atol=1e-4)


def test_relation_map_finds_a_planted_head(smollm2):
    """Write the relation into one head's OV and nothing else: the map must find it there, and only there."""
    tiny = wrap(tiny_gpt2(n_embd=64, n_head=2, n_layer=2), smollm2.tokenizer)
    chosen = scorable(tiny, load_facts("eight"))
    weights = tiny.weights
    e = weights.W_E[[tiny.token_ids(f" {f.subject}")[-1] for f in chosen]]
    target = weights.W_U[:, [tiny.first_token(f.answer) for f in chosen]].T
    with torch.no_grad():
        attn, x = weights.blocks[1].attn, weights.blocks[1].norm_attn(e)
        linear = torch.linalg.lstsq(x, 50 * target, driver="gelsd").solution  # (64, 64), rank 8
        u, s, v = torch.linalg.svd(linear)
        attn.W_V[1], attn.W_O[1] = (u * s)[:, :32], v[:32]
    maps = static.relation_maps(tiny, chosen)
    assert maps["raw"].score[1, 1] == 1.0
    others = maps["raw"].score.clone()
    others[1, 1] = 0
    assert others.max() <= 0.25
    assert maps["raw"].table().site.iloc[0] == "L2 H1"


def test_roles_of_heads_made_to_order(smollm2):
    """A copying head, a suppressing head; random heads carry neither label."""
    tiny = wrap(tiny_gpt2(n_embd=64, n_head=2, n_layer=2), smollm2.tokenizer)
    with torch.no_grad():
        attn = tiny.weights.blocks[0].attn
        for head, sign in ((0, 1.0), (1, -1.0)):
            attn.W_V[head] = torch.eye(64)[:, :32]
            attn.W_O[head] = sign * torch.eye(64)[:32]
    types = static.load_token_types(tiny)
    empty = RelationMap(torch.zeros(2, 2, 8, 8, dtype=torch.bool))
    roles = static.head_roles(tiny, types, [empty], permutations=200)
    assert roles.value.tolist()[:2] == ["copies", "suppresses"]
    assert roles.value.tolist()[2:] == ["neither", "neither"]
    assert len(roles) == 4 and roles.site.tolist() == ["L1 H0", "L1 H1", "L2 H0", "L2 H1"]


def test_a_head_that_seeks_a_planted_type(smollm2):
    tiny = wrap(tiny_gpt2(n_embd=64, n_head=2, n_layer=1), smollm2.tokenizer)
    types = static.load_token_types(tiny)
    with torch.no_grad():
        flag = torch.zeros(64)
        flag[0], flag[1] = 8.0, -8.0
        tiny.weights.W_E[types["number"]] += flag
        attn = tiny.weights.blocks[0].attn
        attn.W_K[0].zero_(), attn.W_Q[0].zero_()
        attn.W_K[0, 0, 0] = 1.0  # the key advertises the flag; any query with weight on dimension 2 asks for it
        attn.W_Q[0, :, 0] = (
            tiny.weights.blocks[0].norm_attn(tiny.weights.W_E[[i for t in types.values() for i in t]]).mean(0)
        )
    empty = RelationMap(torch.zeros(1, 2, 8, 8, dtype=torch.bool))
    head = static.head_roles(tiny, types, [empty], permutations=200).iloc[0]
    assert (head.seeks, head.advertises) == ("number", "number")


def test_permuted_labels_name_no_type():
    """The null must fail: random values of random labels are called `none` at the stated rate."""
    rng = np.random.default_rng(0)
    labels, names = np.repeat(np.arange(8), 40), list("abcdefgh")
    shuffles, _ = static._permuted(labels, 400, 0)
    found = static._type_columns("seeks", torch.tensor(rng.normal(size=(200, 320))), names, labels, shuffles)
    effect, p, named = found["seeks_effect"], found["seeks_p"], np.array(found["seeks"])
    assert ((effect >= static.EFFECT) & (p <= static.ROLE_P)).sum() == (named != "none").sum() <= 6


def test_too_few_single_token_words(tmp_path, tiny):
    path = tmp_path / "types.yaml"
    path.write_text("proper_noun: [Zzyzxqwv, Qqrrttyy, John, Mary]\n")
    with pytest.raises(DataError, match=r"only 2 words of 'proper_noun' are one token"):
        static.load_token_types(tiny, path)


@pytest.mark.model
def test_static_finds_the_same_layer_in_both_halves_of_the_countries(smollm2):
    """Split-half replication: of the upper half of the layers, the three best enriched heads of each half of the
    countries are the same."""
    countries = scorable(smollm2, load_cases("smollm2")[0].large)
    upper = range(smollm2.weights.n_layers // 2, smollm2.weights.n_layers)
    hits = static.relation_maps(smollm2, countries, layers=upper)["enriched"].hits
    halves = [RelationMap(hits[..., i::2, :][..., i::2]) for i in (0, 1)]
    best = [set(h.table(permutations=100).site.head(3)) for h in halves]
    assert best[0] == best[1] == {"L9 H1", "L9 H4", "L9 H5"}  # of these layers: L24
