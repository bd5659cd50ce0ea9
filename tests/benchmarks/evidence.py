"""What inspect_lora.py's measuring costs at the end of a run: evidence, on a V100 on paper.

Operations are simulated as roofline.py does it. The batches are those that the trainer and
inspect_lora.py make of the shipped data. To be quick, only four passes of a kind are simulated, the
narrowest to the widest; a pass is taken to cost something in itself, for each token and for each of
DeltaNet's chunks. A part costs between base and adapter, by its share of LoRA's modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from benchmarks import simulate
from benchmarks.common import GENERAL, Options, inspector, quiet, t, table
from benchmarks.roofline import LAUNCHES_AT, Roofline, counting
from benchmarks.simulate import Pass, Simulation

AT_MOST = 0.40  # of the training's time
REPLY = 50  # tokens of the base's reply to a task, about; assumed


def evidence(options: Options) -> None:
    """Print what each part of the measuring costs, and its share of the training."""
    if inspector is None:
        raise SystemExit("evidence: inspect_lora.py must lie beside train_lora_single.py.")
    job = simulate.simulated_job(options)
    settings, simulation = job.settings, Simulation(options.sizes, job.settings)
    at_once = t.LONGEST_EXAMPLE["32 GB"][0]  # what find_what_fits finds, simulated
    print(f"""\
EVIDENCE  inspect_lora.py after a run with the shipped settings, ON PAPER: a V100 of 32 GB, scaled
float16 products, {at_once:,} tokens at once; seconds at so many microseconds a launch, and their
share of the training. Not counted: what generate() does beside the model, the QR and SVD of the
cuts, copies between host and GPU, the picture, any wait for Python beyond the launches.""")
    steps = simulate.passes_of(simulate.steps_of_epoch(job), t.MemoryLimits(at_once, at_once))
    steps = [dataclasses.replace(one, products="float16") for one in steps]
    roofline, rows = Roofline(simulation), []
    training = settings.NUM_EPOCHS * sum(roofline.seconds(one) for one in steps)  # as in v100
    row = table(46, 8, 8, 8, 8, 8)
    print(row("", "passes", *[f"{launch * 1e6:g} us" for launch in LAUNCHES_AT], "share", "share"))

    def show(what: str, passes: int | str, seconds: Any) -> None:
        rows.append(seconds)
        shares = [f"{one:.1%}" for one in seconds / training]
        print(row(what, passes, *[f"{one:.1f}" for one in seconds], *shares), flush=True)

    def show_replies(what: str, prompts: list[Any], tokens: int, *ways: bool) -> None:
        starts = range(0, len(prompts), inspector.ROWS_AT_ONCE)
        batches = [prompts[start : start + inspector.ROWS_AT_ONCE] for start in starts]
        seconds = [replies(simulation, batch, tokens, on) for batch in batches for on in ways]
        show(what, len(seconds) * tokens, sum(seconds))

    held_out = job.held_out or job.train  # a tiny job has no held-out examples
    spread = inspector.evenly_spread(len(held_out), settings.EVIDENCE_EXAMPLES)
    many = passes_of_losses(held_out, at_once)
    few = passes_of_losses([held_out[number] for number in spread], at_once)
    both = many + few
    base, adapter = (
        fitted(both, lambda number, on=on: loss(simulation, both[number], on))
        for on in (False, True)
    )
    seconds = (base + adapter)[: len(many)].sum(0)
    show(f"base and adapter, {len(held_out)} held-out examples", 2 * len(many), seconds)
    base, adapter = base[len(many) :].sum(0), adapter[len(many) :].sum(0)
    for kind, shares in shares_of_parts(simulation).items():
        seconds = sum(base + share * (adapter - base) for share in shares)
        title = f"{kind}: {len(shares)} parts, {len(spread)} held-out examples"
        show(title, len(shares) * len(few), seconds)
    tasks = inspector.read_tasks(str(GENERAL))[: 8 if options.tiny else None]
    spread = inspector.evenly_spread(len(tasks), settings.EVIDENCE_EXAMPLES)
    for name, system in {"no": "", "training's": t.system_messages(job.train)[0]}.items():
        first = [{"role": "system", "content": system}] if system else []
        prompts = [job.chat_format.prompt_ids(first + tasks[number].messages) for number in spread]
        title = f"{len(prompts)} tasks, {name} system message"
        show_replies(f"replies: {title}", prompts, inspector.REPLY_TOKENS, False)
        examples = [t.Example("", [], "", prompt, [0] * REPLY) for prompt in prompts]
        at_most = inspector.LOGITS_AT_ONCE // options.sizes["vocab_size"]
        batches = [*inspector.batches_of(examples, at_most)]
        passes = [Pass.of(t.pad(batch, "cpu")) for batch in batches]
        strengths = [1.0] if system else sorted((*inspector.STRENGTHS, 1.0))

        def seconds_of(
            number: int, b: list[Any] = batches, p: list[Pass] = passes, s: list[float] = strengths
        ) -> Any:
            return shifts(simulation, b[number], p[number], s)

        seconds = fitted(passes, seconds_of).sum(0)
        show(f"KL: {title}", (len(strengths) + 1) * len(passes), seconds)  # and the base
    prompts = [job.chat_format.prompt_ids(task.messages) for task in tasks if task.check]
    title = f"{len(prompts)} answers, base and adapter"
    show_replies(title, prompts, inspector.REPLY_TOKENS, False, True)
    total = sum(rows)
    show("all", "", total)
    show(f"the training, {settings.NUM_EPOCHS} epochs", "", training)
    prompts = [one.prompt_ids for one in inspector.choose_samples(held_out, settings.NUM_SAMPLES)]
    title = f"besides, {len(prompts)} samples if none ends"  # set by settings of their own
    show_replies(title, prompts, settings.MAX_NEW_TOKENS, False, True)
    for launch, share in zip(LAUNCHES_AT, total / training, strict=True):
        name = f"evidence at {launch * 1e6:g} us, share of the training"
        print(f"{name} {share:.2f}   {options.targets.at_most(name, share, AT_MOST)}")


def fitted(passes: list[Pass], seconds_of: Callable[[int], Any]) -> Any:
    """Return the seconds of each pass, from those of a few, the narrowest to the widest."""
    import numpy

    terms = numpy.array([[1, one.rows * one.width, simulate.chunks(one.width)] for one in passes])
    order = sorted(range(len(passes)), key=lambda number: passes[number].width)
    known = [order[number] for number in inspector.evenly_spread(len(order), 3)] + order[-1:]
    seconds = numpy.array([seconds_of(number) for number in known])
    return terms @ numpy.linalg.lstsq(terms[known], seconds, rcond=None)[0]


def passes_of_losses(examples: list[t.Example], at_once: int) -> list[Pass]:
    """Return the passes that the trainer's example_losses makes of examples."""
    import torch

    model, found = torch.nn.Module(), []
    model.device = "cpu"

    def note(_: Any, inputs: dict[str, Any]) -> Any:
        found.append(Pass.of(inputs))
        return torch.zeros(inputs["labels"].shape)

    with patch.object(t, "reply_losses", note), quiet():
        t.example_losses(model, examples, at_once, "")
    return found


def shares_of_parts(simulation: Simulation) -> dict[str, list[float]]:
    """Return {kind: for each part the share of LoRA's modules that are on}, of two blocks."""
    model, _ = simulation.model(2 * simulation.block, "float16")
    modules, shares = t.lora_layers(model).values(), {}
    for part in inspector.parts_of(model):
        # A cut leaves all modules on; it would decompose weights, which have no values here.
        with contextlib.nullcontext() if part.kind == "cut" else part.change_model():
            on = sum(not module.disable_adapters for module in modules)
        shares.setdefault(part.kind, []).append(on / len(modules))
    return shares


def loss(simulation: Simulation, one: Pass, has_adapter: bool) -> Any:
    """Return the seconds of a batch's losses."""

    def run(model: Any) -> None:
        simulate.script_loss(model, inputs_of(one), one)

    return seconds_without_gradient(simulation, run, has_adapter)


def shifts(
    simulation: Simulation, batch: list[t.Example], one: Pass, strengths: list[float]
) -> Any:
    """Return the seconds of shifts_of for a batch."""
    import torch

    def run(model: Any) -> None:
        places = torch.zeros(2, one.scored, dtype=torch.long).unbind()
        padded = patch.object(t, "pad", lambda *_: inputs_of(one))
        with padded, patch.object(torch.Tensor, "nonzero", lambda *_, **__: places):
            inspector.shifts_of(model, batch, strengths)

    return seconds_without_gradient(simulation, run)


def replies(simulation: Simulation, prompts: list[Any], tokens: int, has_adapter: bool) -> Any:
    """Return the seconds of replies of so many tokens, each step as long as the middle one."""
    import torch
    import transformers

    one = Pass(len(prompts), max(map(len, prompts)) + tokens // 2, 0)

    def run(model: Any, *passes: tuple[Pass, int]) -> None:
        cache = transformers.DynamicCache(config=model.get_base_model().config)
        for each, before in passes:
            inputs = inputs_of(each, before) | {"labels": None}
            out = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
            torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)  # greedy does less

    step = dataclasses.replace(one, width=1), one.width
    ways = ((one, 0),), ((one, 0), step)
    prompt, both = (
        seconds_without_gradient(simulation, lambda model, way=way: run(model, *way), has_adapter)
        for way in ways
    )
    return prompt + (tokens - 1) * (both - prompt)


def inputs_of(one: Pass, before: int = 0) -> dict[str, Any]:
    """Return a pass's inputs without values, after so many tokens that a cache holds."""
    import torch

    ids = torch.empty(one.rows, one.width, dtype=torch.long)
    full = ids.new_empty(one.rows, 1, one.width, before + one.width) > 0
    masks = {"linear_attention": None if before else ids, "full_attention": full}
    return {"input_ids": ids, "labels": ids, "attention_mask": masks}


def seconds_without_gradient(
    simulation: Simulation, run: Callable[[Any], Any], has_adapter: bool = True
) -> Any:
    """Return the seconds of run(model) with all layers, with the adapter or without."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_layers(_: Any, layers: int) -> Any:
        model, mode = simulation.model(layers, "float16")
        model.eval()
        adapter = contextlib.nullcontext() if has_adapter else model.disable_adapter()
        valueless = patch.object(torch.Tensor, "item", lambda _: 0.0)
        where = sdpa_kernel(SDPBackend.MATH)
        with quiet(), mode, torch.no_grad(), where, valueless, adapter, counting(model) as found:
            run(model)
        model.train()
        return found

    return simulation.at_full_depth(with_layers, None)[:, :-1].sum(0)
