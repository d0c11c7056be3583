"""What is compared: each row does one piece of the book's work in the book's way and in a peer's, on the first case of
any model and at the layer that the book's rule diagnoses there. Limits in seconds were set for SmolLM2, and are no goal
elsewhere."""

import copy
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens import patching as lens_patching
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import interventions, models, peers, static, trace, training
from lib.checkpoints import fetching
from lib.facts import Case, Fact, load_templates, prompts
from lib.models import Model
from lib.studies import cross_validation, location
from lib.trace import CONVENTIONS, capture, logit_traces
from lib.weights import pathway_slices
from tests.bench.measure import Row, largest

AROUND = 2  # layers on either side that Captum is asked for
SAMPLE = 64  # prompts that stand for all of chapter 5's at the peer


def studied(model: Model) -> tuple[Case, int]:
    """The model's first case, and its diagnosed layer (0-based)."""
    setting = location.setting(model)
    return setting.case, setting.verdict.knowledge_head.layer


def layers_of_peer(n: int) -> list[int]:
    """Four that stand for all n layers at the peer: a patched pass costs the same anywhere."""
    return [*range(0, n - 1, n // 3), n - 1]


def limit(model: Model, seconds: float) -> float | None:
    """What ours may take at most: on the model for which it was set."""
    return seconds if model.name == "smollm2" else None


def trace_rows(model: Model) -> list[Row]:
    """The full logit trace of 8 prompts, beside one plain forward pass, and beside TransformerLens."""
    case, _ = studied(model)
    texts = prompts(case.facts, load_templates()[case.template])
    answers = torch.tensor([[model.first_token(f.answer)] for f in case.facts])
    tokens, last = model.encode(texts)
    rows, lens = torch.arange(len(texts)), peers.bridge(model)

    @torch.no_grad()
    def ours() -> tuple[Tensor, Tensor]:
        seen = capture(model, texts)
        return seen.logits, logit_traces(model, seen, answers)["scaled"].heads[:, 0]

    @torch.no_grad()
    def forward() -> tuple[Tensor, None]:
        return model.module(tokens, use_cache=False).logits[rows, last], None

    @torch.no_grad()
    def through_lens() -> tuple[Tensor, Tensor]:
        logits, cache = lens.run_with_cache(tokens, prepend_bos=False)
        heads = torch.stack([_heads(model, lens, cache, layer) for layer in range(model.weights.n_layers)], 1)
        final = cache[f"blocks.{model.weights.n_layers - 1}.hook_resid_post"][rows, last]
        direction = trace.logit_direction(model, final, answers[:, 0])
        return logits[rows, last], (heads[rows, :, :, last] * direction[:, None, None]).sum(-1)

    def _heads(model: Model, lens, cache, layer: int) -> Tensor:
        z = cache[f"blocks.{layer}.attn.hook_z"].view(*tokens.shape, model.weights.n_heads, -1)
        W_O = lens.blocks[layer].attn.W_O.view(model.weights.n_heads, -1, model.weights.d_model)
        written, norm = torch.einsum("btnh,nhd->bntd", z, W_O), model.weights.blocks[layer].after_attn
        return written * norm.gain / norm.scale(written.sum(1, keepdim=True))

    what = f"heads, MLPs and biases of {len(texts)} prompts, {len(CONVENTIONS)} conventions"
    logits, heads = (lambda a, b, i=i: largest(a[i], b[i]) for i in (0, 1))
    plain, lens_name = "one plain forward pass (Hugging Face)", "TransformerLens: run_with_cache, heads stacked"
    return [
        Row("logit trace", what, plain, ours, forward, logits, 1e-4, rounds=9),
        Row("logit trace", what, lens_name, ours, through_lens, heads, 1e-3, rounds=5),
    ]


def neuron_rows(model: Model) -> list[Row]:
    """Neurons of the diagnosed layer for all prompts of chapter 5, beside Captum over the layers around it."""
    case, layer = studied(model)
    table = cross_validation.large_prompts(model, case)
    texts, targets = list(table.prompt), torch.tensor(table.answer_token.to_numpy())
    some = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    sample = [texts[i] for i in some]
    layers = list(range(max(0, layer - AROUND), min(model.weights.n_layers, layer + AROUND + 1)))
    what = f"L{layer + 1}, {len(texts):,} prompts, by trace and by gradient"

    def ours() -> Tensor:
        return peers.attribute_neurons(model, texts, targets, [layer]).gradient[some, 0]

    def together() -> Tensor:
        return peers.captum_attributions(model, sample, targets[some], layers)[:, layers.index(layer)]

    def one_by_one() -> Tensor:
        by_layer = [peers.captum_attributions(model, sample, targets[some], [i]) for i in layers]
        return by_layer[layers.index(layer)][:, 0]

    captum, scaled = f"Captum LayerGradientXActivation, {len(layers)} layers", f"({SAMPLE} prompts, scaled)"
    work = {f"{captum}, a call a layer {scaled}": one_by_one, f"{captum}, one call for all {scaled}": together}
    share = SAMPLE / len(texts)
    return [
        Row("neuron trace", what, name, ours, peer, largest, 1e-3, peer_of=share, rounds=2)
        for name, peer in work.items()
    ]


def patching_rows(model: Model) -> list[Row]:
    """Every head at the last position, 8 pairs of prompts of equal length, beside TransformerLens' helper."""
    facts, texts, others = equal_length(model, 8)
    pairs = torch.tensor([[model.first_token(f.answer), model.first_token("the")] for f in facts])
    tokens, last = model.encode(texts)
    clean_tokens, _ = model.encode(others)
    lens, heads, layers = peers.bridge(model), model.weights.n_heads, layers_of_peer(model.weights.n_layers)
    index = pd.DataFrame(
        [(layer, int(last[0]), head) for layer in layers for head in range(heads)], columns=["layer", "pos", "head"]
    )

    def ours() -> Tensor:
        bad, good = interventions.run_with_cache(model, texts), interventions.run_with_cache(model, others)
        found = interventions.patch_components(model, bad, good.z, good.mlps, pairs)[: model.weights.n_layers * heads]
        return found.view(-1, heads, len(texts))[layers].flatten(0, 1)

    @torch.no_grad()
    def through_lens() -> Tensor:
        _, clean = lens.run_with_cache(clean_tokens, prepend_bos=False)
        metric = partial(_margin, pairs=pairs)
        put = lens_patching.layer_pos_head_vector_patch_setter
        patch = lens_patching.generic_activation_patch
        return patch(lens, tokens, clean, metric, put, "z", index_df=index, reduce="none").values

    what = f"{model.weights.n_layers * heads} heads, last position, {len(texts)} pairs"
    name, share = f"TransformerLens' own helper ({len(index)} heads, scaled)", len(layers) / model.weights.n_layers
    return [Row("activation patching", what, name, ours, through_lens, largest, 1e-3, peer_of=share, rounds=3)]


def _margin(logits: Tensor, pairs: Tensor) -> Tensor:
    return -logits[:, -1].gather(1, pairs).diff()[:, 0]


def equal_length(model: Model, n: int) -> tuple[list[Fact], list[str], list[str]]:
    """n facts whose prompts are equally long, and for each the prompt of another of them."""
    case, _ = studied(model)
    texts = prompts(case.large, load_templates()[case.template])
    sizes = pd.Series([len(model.token_ids(t)) for t in texts])
    pick = sizes[sizes == sizes.mode()[0]].index[:n]
    chosen = [texts[i] for i in pick]
    return [case.large[i] for i in pick], chosen, chosen[1:] + chosen[:1]


def step_rows(model: Model) -> list[Row]:
    """One step of V-only training at the diagnosed layer: ours, plain PyTorch (as a model is loaded, and with all else
    frozen) and peft. All take the same prompts and window, and the untouched model's log-probabilities from a store."""
    case, layer = studied(model)
    task = training.task_at(model, case, layer)
    (part,) = pathway_slices(model.module, layer, "v_only")
    rows, start = torch.arange(task.recipe.windows), training.slice_values(model, (part,))[part]
    leaf = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=1e-3)

    def ours() -> tuple[Tensor, Tensor]:
        leaf.data.copy_(start)
        cross_entropy, kl, _ = training.losses(model, task, {part: leaf}, rows)
        return _step(cross_entropy + task.recipe.kl_weight * kl, optimiser, leaf)

    whole = copy.deepcopy(model.module)
    ways = {
        "plain PyTorch, every parameter's gradient": plain_step(model, task, whole.requires_grad_(), part.name),
        "plain PyTorch, all else frozen": plain_step(model, task, copy.deepcopy(model.module), part.name),
        "peft: LoRA of full rank on the same matrix": peft_step(model, task),
    }
    what = f"L{layer + 1}, {len(case.facts)} prompts and {task.recipe.windows} window of {task.recipe.window} tokens"
    return [
        Row("V-only step", what, name, ours, peer, _same_loss if "peft" in name else _same_step, 2e-3, rounds=9)
        for name, peer in ways.items()
    ]


def _step(loss: Tensor, optimiser: torch.optim.Optimizer, leaf: Tensor) -> tuple[Tensor, Tensor]:
    loss.backward()
    gradient = leaf.grad.clone()
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach(), gradient


def _same_step(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    return max(largest(a, b) for a, b in zip(mine, theirs, strict=True))


def _same_loss(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """A factorised change has other gradients, and the same loss at its start."""
    return largest(mine[0], theirs[0])


def plain_loss(
    module: nn.Module, model: Model, task: training.Task, base: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The objective by two whole forward passes, and the logits after the prompts. base: `plain_base`."""
    tokens, last = model.encode(prompts(task.facts, task.template))
    logits = module(input_ids=tokens, use_cache=False).logits[torch.arange(len(last)), last]
    kl = plain_kl(module, task, base, rows)
    return F.cross_entropy(logits, task.answers) + task.recipe.kl_weight * kl, logits


def plain_log_probabilities(model: nn.Module, task: training.Task, rows: Tensor) -> Tensor:
    """At the compared positions of windows."""
    windows = torch.tensor(task.windows)[rows]
    return model(input_ids=windows, use_cache=False).logits[:, task.recipe.read].log_softmax(-1)


@torch.no_grad()
def plain_base(model: Model, task: training.Task) -> Tensor:
    """The untouched model's, on all windows."""
    return plain_log_probabilities(model.module, task, torch.arange(len(task.windows)))


def plain_kl(model: nn.Module, task: training.Task, base: Tensor, rows: Tensor) -> Tensor:
    now = plain_log_probabilities(model, task, rows)
    return F.kl_div(now, base[rows], log_target=True, reduction="none").sum(-1).mean()


def plain_step(model: Model, task: training.Task, module: nn.Module, name: str) -> Callable[[], tuple]:
    leaf = dict(module.named_parameters())[name].requires_grad_()
    start, rows, base = leaf.detach().clone(), torch.arange(task.recipe.windows), plain_base(model, task)
    optimiser = torch.optim.Adam([leaf], lr=1e-3)

    def step() -> tuple[Tensor, Tensor]:
        leaf.data.copy_(start)
        module.zero_grad()
        return _step(plain_loss(module, model, task, base, rows)[0], optimiser, leaf)

    return step


def peft_step(model: Model, task: training.Task) -> Callable[[], tuple]:
    from peft import LoraConfig, get_peft_model

    rank = model.weights.n_kv_heads * model.weights.d_head
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["v_proj"], layers_to_transform=[task.layer])
    module = get_peft_model(copy.deepcopy(model.module), config)
    leaves = [p for p in module.parameters() if p.requires_grad]
    start, rows = [p.detach().clone() for p in leaves], torch.arange(task.recipe.windows)
    base = plain_base(model, task)
    optimiser = torch.optim.Adam(leaves, lr=1e-3)

    def step() -> tuple[Tensor, Tensor]:
        for leaf, value in zip(leaves, start, strict=True):
            leaf.data.copy_(value)
        return _step(plain_loss(module, model, task, base, rows)[0], optimiser, leaves[0])

    return step


FOUR = ("full", "attention", "ffn", "v_only")


def four_rows(model: Model) -> list[Row]:
    """The four pathways, trained to the goal at one rate, set-up included; the plain way trains the same slices of a
    whole model."""
    case, layer = studied(model)
    task = training.task_at(model, case, layer)  # for the plain way: facts and windows

    def ours() -> list[tuple[int, float]]:
        task = training.task_at(model, case, layer)
        runs = [training.train(model, task, name, rate=1e-3) for name in FOUR]
        return [(run.steps, run.kl) for run in runs]

    def plain(frozen: bool) -> list[tuple[int, float]]:
        base = plain_base(model, task)
        return [plain_train(model, task, base, name, frozen) for name in FOUR]

    what = f"L{layer + 1}, to a margin of {training.DEFAULT.margin:g} or {training.DEFAULT.max_steps} steps"
    what = f"{what}, set-up and KL on unseen windows included"
    ways = {"plain PyTorch, every parameter's gradient": False, "plain PyTorch, all else frozen": True}
    return [
        Row("four pathways", what, name, ours, partial(plain, frozen), _same_runs, 1e-2, rounds=3)
        for name, frozen in ways.items()
    ]


def _same_runs(mine: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float:
    """Equal steps, and how far the KLs are apart: training multiplies rounding."""
    if [steps for steps, _ in mine] != [steps for steps, _ in theirs]:
        return float("inf")
    return max(abs(a - b) / b for (_, a), (_, b) in zip(mine, theirs, strict=True))


def plain_train(model: Model, task: training.Task, base: Tensor, pathway: str, frozen: bool) -> tuple[int, float]:
    """Steps to the goal and KL on unseen windows; as `training.train`, on a whole model. frozen: no gradient is asked
    of what stays."""
    module, recipe = copy.deepcopy(model.module).requires_grad_(not frozen), task.recipe
    parameters = dict(module.named_parameters())
    leaves = [parameters[s.name].requires_grad_() for s in pathway_slices(module, task.layer, pathway)]
    optimiser, generator = torch.optim.Adam(leaves, lr=1e-3), torch.Generator().manual_seed(0)
    for step in range(recipe.max_steps + 1):
        rows = torch.randperm(task.n_training, generator=generator)[: recipe.windows]
        loss, logits = plain_loss(module, model, task, base, rows)
        own = logits.gather(1, task.answers[:, None])[:, 0]
        others = logits.scatter(1, task.answers[:, None], float("-inf")).amax(1)
        if float((own - others).detach().min()) >= recipe.margin or step == recipe.max_steps:
            break
        module.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        unseen = torch.arange(task.n_training, len(task.windows))
        return step, float(plain_kl(module, task, base, unseen))


def static_rows(model: Model) -> list[Row]:
    """All four input-free diagnostics of all heads, beside the relation maps alone by whole OV matrices."""
    (case, _), types = studied(model), static.load_token_types(model)
    ids = [i for group in types.values() for i in group]

    def ours() -> Tensor:
        maps = static.relation_maps(model, case.facts)
        static.qk_overlap(model.weights)
        static.k_norms_by_head(model.weights, ids)
        static.head_roles(model, types, list(maps.values()))
        return torch.stack([m.hits for m in maps.values()], 2).flatten(2, 3).float()

    @torch.no_grad()
    def plain() -> Tensor:
        weights, facts = model.weights, case.facts
        e = torch.cat([*static.subject_embeddings(model, facts).values()])
        answers, W_U = [model.first_token(f.answer) for f in facts], weights.norm_final.fold(weights.W_U)
        hits = []
        for block in weights.blocks:
            x, W_V = block.norm_attn(e), block.attn.per_head(block.attn.W_V)
            for head in range(weights.n_heads):
                logits = x @ (W_V[head] @ block.W_O[head]) @ W_U
                hits.append(logits[:, answers] >= logits.topk(10).values[:, -1:])
        return torch.stack(hits).unflatten(0, (weights.n_layers, -1)).float()

    n, difference = model.weights.n_layers * model.weights.n_heads, lambda a, b: float((a - b).abs().max())
    what = (
        f"{n} heads: QK overlap, K-norms, roles with their permutation tests, relation maps of {len(case.facts)} facts"
    )
    name = "relation maps alone, a d_model x d_model matrix a head"
    return [
        Row("static diagnostics", what, name, ours, plain, difference, 0.0, None, rounds=5, seconds=limit(model, 2.0))
    ]


def load_rows(model: Model) -> list[Row]:
    """A cached model, its checksum and weight view checked, beside the plain loading of model and tokenizer."""
    folder = fetching.fetch(model.name)

    def plain() -> Tensor:
        AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.norm.weight.detach()

    def ours() -> Tensor:
        return models.load(model.name).module.model.norm.weight.detach()

    what, name = f"{model.name}, from the cache, checked", "from_pretrained, unchecked"
    return [Row("loading", what, name, ours, plain, largest, 0.0, None, rounds=5, seconds=limit(model, 0.5))]


ROWS = (trace_rows, neuron_rows, patching_rows, step_rows, four_rows, static_rows, load_rows)
