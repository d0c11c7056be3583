"""The same code where the model is elsewhere: on a simulated device every tensor is made where the model is, and the
numbers are those of the CPU. No GPU takes part, so nothing here speaks of one's speed or rounding."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import diagnosis, edits, evaluation, files, interventions, models, peers, sites, static, training
from lib.checkpoints import fetching
from lib.facts import load_cases, load_templates, prompts
from lib.interventions import Part
from lib.models import Model
from lib.recall import study_facts, trainable
from lib.studies import location, planted, repairs
from lib.studies.repairs import repair_at
from lib.sweeps import experiments
from lib.trace import capture, logit_lens, logit_traces, subject_attention
from lib.weights import view
from tests import simulated

LAYER = 7  # 0-based: where the organism's head is blind
Numbers = list[torch.Tensor | np.ndarray | float]


@pytest.fixture(scope="module")
def elsewhere(organism: Model) -> Model:
    with simulated.Simulated():
        module = copy.deepcopy(organism.module).to(simulated.DEVICE)
    return replace(organism, module=module, weights=view(module))


def asked(model: Model):
    case = trainable(model, load_cases("organism")[0])
    answers = torch.tensor([model.first_token(f.answer) for f in case.facts])
    failing, control = (prompts(case.facts, load_templates()[t]) for t in (case.template, case.controls[0]))
    return case, failing, control, answers


def traces(model: Model) -> Numbers:
    case, failing, _, answers = asked(model)
    seen = capture(model, failing)
    found = logit_traces(model, seen, answers[:, None])
    return [t.heads for t in found.values()] + [
        *logit_lens(model, seen, answers[:, None]),
        subject_attention(
            model, interventions.run_with_cache(model, failing).patterns, failing, [f.subject for f in case.facts]
        ),
    ]


def diagnoses(model: Model) -> Numbers:
    found = [diagnosis.prescribe(model, trainable(model, case)) for case in load_cases("organism")]
    return [float(at) for verdict in found for at in (verdict.knowledge_head.layer, verdict.knowledge_head.head)]


def statics(model: Model) -> Numbers:
    maps = static.relation_maps(model, study_facts(model, asked(model)[0]))
    norms = static.k_norm_table(model.weights, static.load_token_types(model), resamples=20)
    return [static.qk_overlap(model.weights), *(m.p_values(permutations=20) for m in maps.values()), norms["mean"]]


def patches(model: Model) -> Numbers:
    _, failing, control, answers = asked(model)
    bad, good = interventions.run_with_cache(model, failing), interventions.run_with_cache(model, control)
    return [interventions.patch_components(model, bad, good.z, good.mlps, torch.stack((answers, answers.roll(1)), 1))]


def ablations(model: Model) -> Numbers:
    _, _, control, answers = asked(model)
    found = peers.attribute_neurons(model, control, answers, [LAYER, LAYER + 1])
    head, own = sites.Site(LAYER, 4), interventions.ablate_top_neurons(model, control, answers, LAYER)
    return [found.trace, found.gradient, interventions.ablate(model, control, answers, Part(head)).total, own.total]


def trainings(model: Model) -> Numbers:
    case = asked(model)[0]
    run = training.train(model, training.task_at(model, case, LAYER), "v_only", rate=3e-3)
    edits.save_all({"v_only": run.edit}, folder := Path(files.cache_folder() / "device"))
    passage = next(iter(evaluation.load_passages().values()))[:800]
    some = {"texts": {"": passage}, "table": evaluation.questions(model, case)[::7]}
    edit, protocol = edits.load_all(folder)["v_only"], evaluation.build_protocol(model, case, LAYER, **some)
    margins = evaluation.score_questions(model, protocol, edit).margin
    kl = evaluation.score_passages(model, protocol, {"": evaluation.noise(model, edit)})[""].kl
    return [run.history.loss, margins, kl, float(edits.verify(model, edit)["as recorded"].all())]


def sweeps(model: Model) -> Numbers:
    rows = [experiments.find("location.part_at")(model, part="neurons", pick="diagnosed", seed=0)]
    rows += [repair_at(model, case=1, pathway=pathway, rate=1e-3, steps=2) for pathway in ("sink_kv", "v_only")]
    rows += [experiments.find("planted.plant_run")(model, seed=s, repair=s == 0) for s in (0, 1)]
    return [float(v) for row in rows for v in row.values() if isinstance(v, int | float)]


SLOW = [pytest.param(work, marks=pytest.mark.slow) for work in (trainings, sweeps)]


@pytest.mark.parametrize("work", [traces, diagnoses, statics, patches, ablations, *SLOW])
def test_elsewhere_the_numbers_are_the_same(organism, elsewhere, work: Callable, monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(planted, "STEPS", 5)  # 60 multiply rounding
    one_passage = dict([*evaluation.load_passages().items()][:1])
    monkeypatch.setattr(evaluation, "load_passages", lambda: one_passage)
    for study in (location, repairs):
        monkeypatch.setattr(study, "questions", lambda *given: evaluation.questions(*given)[::5])
    here = work(replace(organism))  # which remembers nothing of other tests, nor they of its one passage
    with simulated.Simulated(), simulated.AsDefault():
        monkeypatch.setattr(torch, "get_default_device", lambda: simulated.DEVICE)
        there = work(elsewhere)
    assert len(here) == len(there) and here
    for a, b in zip(here, there, strict=True):
        assert not isinstance(a, torch.Tensor) or b.device == simulated.DEVICE, "results stay where the model is"
        a, b = (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1e-4, rtol=1e-3)


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated.Simulated():
        there, here = torch.ones(3).to(simulated.DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            there + here
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            here[torch.tensor([0]).to(simulated.DEVICE)]
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert there[torch.tensor([0])].device == simulated.DEVICE, "indices may stay behind"
        with simulated.AsDefault(), pytest.raises(RuntimeError, match="a generator of the cpu"):
            torch.randperm(3, generator=torch.Generator().manual_seed(0))


def test_a_gpu_is_taken_where_there_is_one_and_nothing_else_is_changed(organism, elsewhere, monkeypatch):
    """`load` asks torch and moves the model there; where new tensors are made, the owner of the process says."""
    moved, default = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_default_device", default.append)
    monkeypatch.setattr(models, "memory_at_hand", lambda device=None: 10**12)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: moved.append(device) or model)
    models.load("organism")
    assert moved == [torch.device("cuda")] and not default
    assert models.use_device_of(elsewhere) is elsewhere and default == [elsewhere.device] == [simulated.DEVICE]
    assert models.use_device_of(organism) is organism and len(default) == 1, "on the CPU nothing need be said"
