"""The loss of target tokens: that of full logits, whatever a model does after its head."""

import copy

import peft
import pytest
import runs
import torch
import transformers
from conftest import TOY
from toys import family, layers_of

from train_lora.fp16_matmul import use_fp16_matmul
from train_lora.losses import head_of, needs_logits, token_losses, with_few_targets
from train_lora.tokens import pad

NEAR = 1e-5  # of a norm: float32 sums in another order
WIDE = {"initializer_range": 0.5, "tie_word_embeddings": False}
CAP = 2.0
KINDS = {  # the configuration, and whether the loss can do without the logits
    "Llama": (lambda: family("Llama", **WIDE), True),
    "tied": (lambda: family("Llama", **WIDE | {"tie_word_embeddings": True}), True),
    "bias": (lambda: family("Phi", **WIDE | {"num_key_value_heads": 4}), True),
    "Qwen3.5": (lambda: transformers.AutoConfig.from_pretrained(TOY).get_text_config(), True),
    "Gemma": (lambda: family("Gemma2", **WIDE | {"final_logit_softcapping": CAP}), False),
    "Granite": (lambda: family("Granite", **WIDE | {"logits_scaling": 3.0}), False),
}
LENGTHS = {"of several lengths": [(9, 20), (3, 31), (17, 1)], "without targets": [(12, 0), (5, 0)]}


def rows_of(lengths):
    draw = torch.Generator().manual_seed(0)
    examples = []
    for prompt, reply in lengths:
        ids = torch.randint(3, 3000, (prompt + reply,), generator=draw).tolist()
        examples.append(runs.made_up(ids[:prompt], ids[prompt:]))
    return pad(examples, "cpu")


def model_of_kind(kind, dtype=torch.float32, **lora):
    """Return a model with LoRA that has an effect, and no dropout."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind][0](), dtype=dtype)
    if kind == "bias":
        model.lm_head.bias.data.normal_()
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()} & PROJECTIONS
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=[*names], **lora)
    model = peft.get_peft_model(model, config).eval()
    runs.set_b(model)
    return model


PROJECTIONS = {"q_proj", "o_proj", "dense", "in_proj_qkv", "gate_proj", "fc1", "down_proj"}


def by_logits(model, inputs):
    """Return the losses of all targets and their mean's gradients from the logits of all tokens."""
    model.zero_grad()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    targets = inputs["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return losses.detach(), gradients_of(model, losses, targets)


def by_script(model, inputs):
    model.zero_grad()
    losses = token_losses(model, inputs)
    return losses.detach(), gradients_of(model, losses, inputs["labels"][:, 1:])


def gradients_of(model, losses, targets):
    (losses.sum() / max(1, (targets != -100).sum())).backward()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return {name: w.grad.clone() for name, w in trained.items() if w.grad is not None}


def distance(gradients, expected):
    assert gradients.keys() == expected.keys() != set()
    apart = [(gradients[name] - expected[name]).double().norm() for name in expected]
    whole = [expected[name].double().norm() for name in expected]
    return (torch.stack(apart).norm() / torch.stack(whole).norm().clamp(min=1e-30)).item()


@pytest.fixture
def in_parts(monkeypatch):
    """Let the logits of seven targets be in memory at once."""
    runs.replace_ours(monkeypatch, "LOGITS_AT_ONCE", 7 * 3072)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_all_logits(kind, lengths, in_parts):
    model, inputs = model_of_kind(kind), rows_of(LENGTHS[lengths])
    expected_losses, expected = by_logits(model, inputs)
    if kind == "Gemma" and LENGTHS[lengths][0][1]:  # most logits would be beyond the cap
        assert 0.5 * CAP < model(inputs["input_ids"]).logits.abs().max() <= CAP
    for _ in range(2):  # what a model returned once is not asked again
        losses, gradients = by_script(model, inputs)
        assert torch.dist(losses, expected_losses) <= NEAR * expected_losses.norm()
        assert distance(gradients, expected) <= NEAR
    assert needs_logits(model) != KINDS[kind][1]
    assert "forward" not in vars(head_of(model))
    with torch.no_grad():  # as in evaluation
        assert torch.dist(token_losses(model, inputs), expected_losses) <= 1e-4


def test_no_tensor_of_all_logits_is_kept_for_the_backward_pass(in_parts):
    model, inputs, sizes = model_of_kind("Llama"), rows_of([(9, 40)]), []
    note = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_losses(model, inputs)
    assert max(sizes) < 40 * 3072


TRAINED_HEADS = {
    "as a whole": {"modules_to_save": ["lm_head"]},
    "by LoRA": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("how", TRAINED_HEADS)
def test_a_head_that_is_trained_gets_its_gradient(how):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS["Llama"][0](), dtype=torch.float32)
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | TRAINED_HEADS[how]
    model, inputs = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval(), rows_of([(9, 20)])
    runs.set_b(model)
    losses, expected = by_logits(model, inputs)
    found, gradients = by_script(model, inputs)
    assert torch.dist(found, losses) <= NEAR * losses.norm()
    assert distance(gradients, expected) <= NEAR
    heads = [name for name in gradients if "lm_head" in name]
    assert heads and all(gradients[name].any() for name in heads)
    with model.disable_adapter(), torch.no_grad():  # the base's own head
        logits = model(inputs["input_ids"]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits, inputs["labels"][0, 1:], reduction="none"
        )
        assert torch.dist(token_losses(model, inputs)[0], losses) <= NEAR * losses.norm()


HOOKS = {
    "halves what comes in": lambda head: head.register_forward_pre_hook(
        lambda _, given: (0.5 * given[0],)
    ),
    "halves what goes out": lambda head: head.register_forward_hook(
        lambda _, __, logits: 0.5 * logits
    ),
    "writes into what goes out": lambda head: head.register_forward_hook(
        lambda _, __, logits: logits.mul_(0.5)
    ),
}


@pytest.mark.parametrize("what", HOOKS)
def test_a_hook_of_the_head_acts_once(what):
    model, inputs = model_of_kind("Llama"), rows_of([(9, 20)])
    HOOKS[what](head_of(model))
    losses, expected = by_logits(model, inputs)
    found, gradients = by_script(model, inputs)
    assert torch.dist(found, losses) <= NEAR * losses.norm()
    assert distance(gradients, expected) <= NEAR


@pytest.mark.parametrize("kept", [{}, {"forward": abs}], ids=["the class's", "its own"])
def test_a_pass_that_fails_leaves_the_heads_forward_as_it_was(kept):
    model, inputs = model_of_kind("Llama"), rows_of([(9, 20)])
    head = head_of(model)
    vars(head).update(kept)
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_losses(model, inputs)
    assert vars(head).get("forward") is kept.get("forward")


@pytest.mark.parametrize("is_fp16", [False, True], ids=["bfloat16", "scaled float16"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3.5"])
def test_rounding_moves_gradients_no_further_than_with_all_logits(kind, is_fp16, in_parts):
    inputs = rows_of([(9, 40), (20, 60), (3, 33)])
    rounded = model_of_kind(kind, torch.bfloat16)
    for layer in layers_of(rounded).values():
        layer.lora_A.float(), layer.lora_B.float()
    exact = copy.deepcopy(rounded).float()
    if is_fp16:
        use_fp16_matmul(rounded.base_model.model)
    _, expected = by_logits(exact, inputs)
    losses, by_all = by_logits(rounded, inputs)
    found, gradients = by_script(rounded, inputs)
    assert torch.dist(found, losses) <= 1e-3 * losses.norm()
    assert 0 < distance(gradients, expected) <= 1.05 * distance(by_all, expected)


def test_a_row_with_many_targets_is_divided_where_the_logits_are_needed(monkeypatch):
    """Each target once, with all that comes before it; the gradient is the whole row's."""
    runs.replace_ours(monkeypatch, "MOST_TARGETS", 8)
    inputs = rows_of([(9, 20), (3, 31), (17, 1)])
    batches = list(with_few_targets(inputs))
    assert len(batches) == 4
    for batch in batches:
        assert ((batch["labels"] != -100).sum(1) <= 8).all()
    taught = sum(torch.nn.functional.pad(p["labels"] + 100, (0, 34 - p["labels"].shape[1]))
                 for p in batches)  # fmt: skip
    assert taught.equal(inputs["labels"] + 100)
    for part in (rows_of([(9, 5), (4, 8)]), rows_of([(3, 0)])):
        assert [*with_few_targets(part)] == [part]
    alone = {key: value[:1] for key, value in inputs.items()}
    for batch in with_few_targets(alone):
        assert batch["labels"][0, -1] != -100  # nothing goes through for no target


@pytest.fixture
def one_process():
    """Be the only process of a group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["Llama", "Granite"])
def test_a_model_in_ddp_is_asked_as_well(kind, one_process):
    model, inputs = model_of_kind(kind), rows_of([(9, 20)])
    losses, expected = by_logits(model, inputs)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    found, gradients = by_script(ddp, inputs)
    assert torch.dist(found, losses) <= NEAR * losses.norm()
    gradients = {name.removeprefix("module."): one for name, one in gradients.items()}
    assert distance(gradients, expected) <= NEAR
    assert needs_logits(ddp) == needs_logits(model) == (kind == "Granite")
