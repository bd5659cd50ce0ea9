"""What `inspect_lora evidence` costs after a run, on a V100 on paper.

Operations are simulated as roofline.py does it. The batches are those that the trainer and the
package make of the shipped data. To be quick, only four passes of a kind are simulated, the
narrowest to the widest; a pass is taken to cost something in itself, for each token and for each of
DeltaNet's chunks. A part costs between base and adapter, by its share of LoRA's modules.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import simulate
from benchmarks.common import HELD_OUT, Options, quiet, shipped_lines, t, table, write_lines
from benchmarks.roofline import LAUNCHES_AT, Roofline, counting
from benchmarks.simulate import CARDS, Pass, Simulation, inputs_of, nothing_is_packed
from inspect_lora import conversations, elsewhere, parts, replies, scores
from inspect_lora import evidence as command

AT_MOST = 0.40  # of the training's time, without checks and samples
REPLY = 50  # tokens of the base's reply to a task, about; assumed


def evidence(options: Options) -> None:
    """Print what each part of the measuring costs, and its share of the training."""
    job = simulate.simulated_job(options)
    simulation = Simulation(options.sizes, job.settings)
    ledger = Ledger(Roofline(simulation), job, options)
    asked = options_as_shipped()
    held_out, checked = held_out_lines(job, options)
    tasks = conversations.read_tasks(asked.general_file)[: 8 if options.tiny else None]
    print("""\
EVIDENCE  `inspect_lora evidence` after a run with the shipped settings, ON PAPER: a V100 of 32 GB,
scaled float16 products; seconds at so many microseconds a launch, and their share of the training.
Not counted: what generate() does beside the model, the QR and SVD of updates and cuts, copies
between host and GPU, the picture, any wait for Python beyond the launches.""")
    print(ledger.row("", "passes", *[f"{one * 1e6:g} us" for one in LAUNCHES_AT], "share", "share"))
    show_losses(ledger, held_out, asked.examples)
    show_change(ledger, job, tasks, asked.examples)
    total = ledger.show_sum("parts and what else changed")
    ledger.show(f"the training, {job.settings.NUM_EPOCHS} epochs", "", ledger.training)
    checked += [task for task in tasks if task.checks]
    prompts = [job.chat_format.prompt_ids(task.messages) for task in checked]
    ledger.show_replies("besides: checks", prompts, replies.CHECKED_TOKENS)
    chosen = replies.choose_samples(held_out, asked.group, asked.samples)
    prompts = [example.prompt_ids for example in chosen]
    ledger.show_replies("besides: samples, none ends", prompts, asked.max_new_tokens)
    for launch, share in zip(LAUNCHES_AT, total / ledger.training, strict=True):
        name = f"evidence at {launch * 1e6:g} us, share of the training"
        print(f"{name} {share:.2f}   {options.targets.at_most(name, share, AT_MOST)}")


def options_as_shipped() -> argparse.Namespace:
    """Return what the command is given if no flag is."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["final_lora"])


def held_out_lines(
    job: t.Job, options: Options
) -> tuple[list[t.Example], list[conversations.Task]]:
    """Return the shipped held-out examples with their tokens, and those that have checks."""
    lines = shipped_lines(HELD_OUT, 8 if options.tiny else None, shortest=options.tiny)
    path = write_lines(options.folder / "eval.jsonl", lines)
    asked = argparse.Namespace(eval_file=str(path), enable_thinking=False)
    with quiet():
        held_out = conversations.read_held_out(asked, None)
        examples, problems = t.encode(held_out.examples, job.chat_format, None)
    assert not problems
    return examples, held_out.checked


class Ledger:
    """Adds up what is shown, and compares it with the training."""

    def __init__(self, roofline: Roofline, job: t.Job, options: Options) -> None:
        """Compute what the training takes, as v100 does."""
        self.simulation = roofline.simulation
        self.rows: list[Any] = []
        self.row = table(46, 8, 8, 8, 8, 8)
        limits = t.MemoryLimits(*[t.most_tokens(job)[1]] * 2)
        if not options.tiny:
            limits = self.simulation.limits(job, CARDS["32 GB"])
        passes = simulate.passes_of(simulate.steps_of_epoch(job), limits)
        steps = [dataclasses.replace(one, products="float16") for one in passes]
        self.training = job.settings.NUM_EPOCHS * sum(roofline.seconds(one) for one in steps)

    def show(self, what: str, passes: int | str, seconds: Any) -> None:
        """Print a row; seconds are an array with one number for each time of a launch."""
        self.rows.append(seconds)
        shares = [f"{one:.1%}" for one in seconds / self.training]
        print(self.row(what, passes, *[f"{one:.1f}" for one in seconds], *shares), flush=True)

    def show_sum(self, what: str) -> Any:
        """Print the sum of all rows so far, and return it."""
        total = sum(self.rows)
        self.show(what, "", total)
        return total

    def show_replies(
        self,
        what: str,
        prompts: list[list[int]],
        tokens: int,
        ways: tuple[bool, ...] = (False, True),
    ) -> None:
        """Show what replies of so many tokens cost, of the base (False) and of the adapter."""
        starts = range(0, len(prompts), replies.ROWS_AT_ONCE)
        batches = [prompts[start : start + replies.ROWS_AT_ONCE] for start in starts]
        seconds = [
            seconds_of_replies(self.simulation, batch, tokens, on)
            for batch in batches
            for on in ways
        ]
        title = f"{what}: {len(prompts)} replies" + (" of each" if len(ways) > 1 else "")
        self.show(title, len(seconds) * tokens, sum(seconds))


# ==== the parts


def show_losses(ledger: Ledger, held_out: list[t.Example], wanted: int) -> None:
    """Show the losses of base and adapter on all examples, and those of the parts on some."""
    simulation = ledger.simulation
    some = [held_out[number] for number in scores.draw_numbers(len(held_out), wanted)]
    many, few = passes_of_losses(held_out), passes_of_losses(some)
    both = many + few
    base, adapter = (
        fitted(both, lambda number, on=on: seconds_of_loss(simulation, both[number], on))
        for on in (False, True)
    )
    seconds = (base + adapter)[: len(many)].sum(0)
    ledger.show(f"base and adapter, {len(held_out)} held-out examples", 2 * len(many), seconds)
    base, adapter = base[len(many) :].sum(0), adapter[len(many) :].sum(0)
    for kind, shares in shares_of_parts(simulation).items():
        seconds = sum(base + share * (adapter - base) for share in shares)
        title = f"{kind}: {len(shares)} parts, {len(some)} held-out examples"
        ledger.show(title, len(shares) * len(few), seconds)


def show_change(ledger: Ledger, job: t.Job, tasks: list[conversations.Task], wanted: int) -> None:
    """Show the base's replies to other tasks, and how far the adapter is from it on these."""
    simulation = ledger.simulation
    some = [tasks[number] for number in scores.draw_numbers(len(tasks), wanted)]
    for name, system in {"no": "", "training's": t.system_messages(job.examples)[0]}.items():
        first = [{"role": "system", "content": system}] if system else []
        prompts = [
            job.chat_format.prompt_ids(
                (first if task.messages[0]["role"] != "system" else []) + task.messages
            )
            for task in some
        ]
        ledger.show_replies(f"{name} system message", prompts, elsewhere.REPLY_TOKENS, (False,))
        examples = [
            t.Example("", [], prompt_ids=prompt, reply_ids=[0] * REPLY) for prompt in prompts
        ]
        at_most = elsewhere.LOGITS_AT_ONCE // simulation.sizes["vocab_size"]
        batches = [*elsewhere.batches_of(examples, at_most)]
        passes = [Pass.of(t.pad(batch, "cpu")) for batch in batches]
        strengths = [1.0] if system else sorted((*parts.STRENGTHS, 1.0))

        def seconds_of(
            number: int, b: list[Any] = batches, p: list[Pass] = passes, s: list[float] = strengths
        ) -> Any:
            return seconds_of_shifts(simulation, b[number], p[number], s)

        seconds = fitted(passes, seconds_of).sum(0)
        title = f"KL: {len(prompts)} tasks, {name} system message"
        ledger.show(title, (len(strengths) + 1) * len(passes), seconds)  # and the base


def fitted(passes: list[Pass], seconds_of: Callable[[int], Any]) -> Any:
    """Return the seconds of each pass, from those of a few, the narrowest to the widest."""
    terms = numpy.array([[1, one.rows * one.width, simulate.chunks(one.width)] for one in passes])
    order = sorted(range(len(passes)), key=lambda number: passes[number].width)
    known = sorted({*[order[n] for n in scores.draw_numbers(len(order), 3)], order[-1]})
    seconds = numpy.array([seconds_of(number) for number in known])
    return terms @ numpy.linalg.lstsq(terms[known], seconds, rcond=None)[0]


def passes_of_losses(examples: list[t.Example]) -> list[Pass]:
    """Return the passes that the package's losses_of() makes of examples."""
    model, found = torch.nn.Module(), []
    model.device = "cpu"

    def note(_: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found.append(Pass.of(inputs))
        return torch.zeros(inputs["labels"].shape)

    with patch.object(t, "reply_losses", note), quiet():
        scores.losses_of(model, examples, "")
    return found


def shares_of_parts(simulation: Simulation) -> dict[str, list[float]]:
    """Return {kind: for each part the share of LoRA's modules that are on}, of two blocks."""
    model = simulation.model(2 * simulation.block, "float16")
    modules, shares = t.lora_layers(model).values(), {}
    for part in parts.parts_of(model):
        # A cut leaves all modules on; it would decompose weights, which have no values here.
        with contextlib.nullcontext() if part.kind == "cut" else part.change_model():
            on = sum(not module.disable_adapters for module in modules)
        shares.setdefault(part.kind, []).append(on / len(modules))
    return shares


# ==== what passes without a gradient cost


def seconds_of_loss(simulation: Simulation, one: Pass, has_adapter: bool) -> Any:
    """Return the seconds of a batch's losses."""

    def run(model: torch.nn.Module) -> None:
        simulate.script_loss(model, inputs_of(one), one)

    return seconds_without_gradient(simulation, run, has_adapter)


def seconds_of_shifts(
    simulation: Simulation, batch: list[t.Example], one: Pass, strengths: list[float]
) -> Any:
    """Return the seconds of the package's shifts_of() for a batch."""

    def run(model: torch.nn.Module) -> None:
        places = torch.zeros(2, one.scored, dtype=torch.long).unbind()
        padded = patch.object(elsewhere, "pad", lambda *_: inputs_of(one))
        with padded, patch.object(torch.Tensor, "nonzero", lambda *_, **__: places):
            elsewhere.shifts_of(model, batch, strengths)

    return seconds_without_gradient(simulation, run)


def seconds_of_replies(
    simulation: Simulation, prompts: list[list[int]], tokens: int, has_adapter: bool
) -> Any:
    """Return the seconds of replies of so many tokens, each step as long as the middle one."""
    one = Pass(len(prompts), max(map(len, prompts)) + tokens // 2, 0)

    def run(model: torch.nn.Module, *passes: tuple[Pass, int]) -> None:
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


def seconds_without_gradient(
    simulation: Simulation, run: Callable[[torch.nn.Module], Any], has_adapter: bool = True
) -> Any:
    """Return the seconds of run(model) with all layers, with the adapter or without."""

    def with_layers(_: Any, layers: int) -> Any:
        model = simulation.model(layers, "float16")
        model.eval()
        adapter = contextlib.nullcontext() if has_adapter else model.disable_adapter()
        valueless = patch.object(torch.Tensor, "item", lambda _: 0.0)
        device, where = torch.device("meta"), sdpa_kernel(SDPBackend.MATH)
        with (
            quiet(),
            device,
            torch.no_grad(),
            where,
            nothing_is_packed(),
            valueless,
            adapter,
            counting(model) as found,
        ):
            run(model)
        model.train()
        return found

    return simulation.at_full_depth(with_layers, None)[:, :-1].sum(0)
