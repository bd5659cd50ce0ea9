"""Chat models of other families: the templates in TRL's wheel, on tiny random models."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import trl
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from trainers import edited_script, refused
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train_lora_single as t

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
QWEN = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
DEEPSEEK = [f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "end\u2581of\u2581sentence")]
COHERE = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"]
COHERE += ["<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]
GPT_OSS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
VISION = ["<|im_start|>", "<end_of_utterance>", "<image>"]
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# Of each template: its tokens, its tokenizer's end, the ends in generation_config.json, the
# class of the model, and what else its configuration needs.
FAMILIES = {
    "llama3": (LLAMA_3, "<|eot_id|>", [], "Llama", {}),
    "llama3_1": (LLAMA_3, "<|eot_id|>", [], "Llama", {}),
    "llama3_2": (LLAMA_3, "<|eot_id|>", [], "Llama", {}),
    "phi3_5": (PHI, "<|endoftext|>", ["<|end|>", "<|endoftext|>"], "Phi3", {}),
    "gemma": (GEMMA, "<eos>", ["<eos>", "<end_of_turn>"], "Gemma2", {}),
    "gemma3": (GEMMA, "<eos>", ["<eos>", "<end_of_turn>"], "Gemma3Text", {}),
    "qwen2_5": (QWEN, "<|im_end|>", [], "Qwen2", {}),
    "qwen3": (QWEN, "<|im_end|>", [], "Qwen3", {}),
    "qwen3_instruct_2507": (QWEN, "<|im_end|>", [], "Qwen3Moe", {"num_experts": 4} | EXPERTS),
    "qwen3_5_nothink": (QWEN, "<|im_end|>", [], "the tests' own", {}),
    "cohere": (COHERE, "<|END_OF_TURN_TOKEN|>", [], "Cohere", {}),
    "cohere2": (COHERE, "<|END_OF_TURN_TOKEN|>", [], "Cohere2", {}),
    "lfm2": (QWEN, "<|im_end|>", [], "Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "gptoss": (GPT_OSS, "<|return|>", [], "GptOss", {"num_local_experts": 4} | EXPERTS),
    "glm4moe": (GLM, "<|endoftext|>", ["<|endoftext|>", "<|user|>"], "Llama", {}),
    "deepseekv3": (DEEPSEEK, DEEPSEEK[2], [], "Llama", {}),
    "deepseek_r1_distill": (DEEPSEEK, DEEPSEEK[2], [], "Llama", {}),
    "smolvlm": (VISION, "<end_of_utterance>", [], "Llama", {}),
    "idefics3": (VISION, "<end_of_utterance>", [], "Llama", {}),
    "llava_next": (VISION, "<end_of_utterance>", [], "Llama", {}),
}


def template_of(family):
    return (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")


def tokenizer_of(family):
    """Return a tokenizer of single bytes, with a family's template and its control tokens."""
    tokens, end, *_ = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=template_of(family),
        bos_token=tokens[0],
        eos_token=end,
        pad_token=tokens[0],
    )


def random_model(name, vocabulary, **sizes):
    """Return a tiny model of a class with random weights."""
    shapes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if name in ("Phi3", "Lfm2", "Qwen2"):  # their heads have the size hidden / heads
        del shapes["head_dim"]
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **shapes | sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def chat_model(folder, family, tiny, template=""):
    """Write a tiny random model of a family; return its path."""
    _, _, ends, name, sizes = FAMILIES[family]
    if family == "qwen3_5_nothink":
        shutil.copytree(tiny, folder)
    else:
        tokenizer = tokenizer_of(family)
        tokenizer.save_pretrained(folder)
        random_model(name, len(tokenizer), **sizes).save_pretrained(folder)
        known = {"eos_token_id": tokenizer.convert_tokens_to_ids(ends)} if ends else {}
        (folder / "generation_config.json").write_text(json.dumps(known))
    (folder / "chat_template.jinja").write_text(template or template_of(family))
    return str(folder)


def without_system_messages(path):
    """Take the system messages out of a file."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt"] = [one for one in row["prompt"] if one["role"] != "system"]
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


PHI_TARGETS = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
LFM_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


# ---- which templates train, and which are refused -----------------------------------------------


# Targets, if the settings' are not the model's; and the end of a reply.
TRAINED = {
    "llama3": ([], "<|eot_id|>"),
    "llama3_1": ([], "<|eot_id|>"),
    "llama3_2": ([], "<|eot_id|>"),
    "phi3_5": (PHI_TARGETS, "<|end|>"),
    "gemma3": ([], "<end_of_turn>"),
    "qwen2_5": ([], "<|im_end|>"),
    "qwen3": ([], "<|im_end|>"),
    "qwen3_instruct_2507": (ATTENTION, "<|im_end|>"),
    "qwen3_5_nothink": ([], "<|im_end|>"),
    "cohere": ([], "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ([], "<|END_OF_TURN_TOKEN|>"),
    "lfm2": (LFM_TARGETS, "<|im_end|>"),
    "gptoss": (ATTENTION, "<|return|>"),
}
DATED = ("llama3_2", "gptoss")
IN_PARTS = ["leaves out what the assistant says", "in parts, with pictures"]
THINKING = ["differently once the reply follows", '"<think>\\n"', "not equal serving"]
REFUSED = {
    "gemma": ["refuses the system message", "System role not supported", "first user message"],
    "glm4moe": ["does not end a reply with <|endoftext|> or <|user|>", "learn to stop"],
    "deepseekv3": THINKING,
    "deepseek_r1_distill": THINKING,
    "smolvlm": IN_PARTS,
    "idefics3": IN_PARTS,
    "llava_next": ["refuses a plain conversation", "has no attribute"],
}


@pytest.mark.parametrize("family", TRAINED)
def test_a_template_that_can_be_served_is_planned(family, flags, tmp_path, tiny, capsys):
    targets, end = TRAINED[family]
    model = chat_model(tmp_path / "model", family, tiny)
    flags = [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "2500"]
    t.main([*flags, *(["--lora_target_modules", *targets] if targets else [])])
    out = " ".join(capsys.readouterr().out.split())
    assert f"a reply ends with {end} " in out and "Nothing was trained" in out
    assert ("prints the day's date" in out) == (family in DATED)


@pytest.mark.parametrize("family", REFUSED)
def test_a_template_that_cannot_is_refused_once_of_the_model(family, flags, tmp_path, tiny, capsys):
    model = chat_model(tmp_path / "model", family, tiny)
    said = refused(capsys, [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"])
    assert said.startswith(f"MODEL_NAME {model}: its chat template ")
    assert said.count("chat template ") <= 2 and "problem" not in said
    assert re.search(r"train\.jsonl:1\b", said) and "another model" in said.lower()
    for part in REFUSED[family]:
        assert part in said


# ---- what is trained, and loaded by PEFT alone --------------------------------------------------


def trained_logits(monkeypatch, seen):
    """Have the trained model's logits kept before the adapter is loaded again."""
    real = t.verify_saved_adapter

    def keep(model, folder, example):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            seen.append((ids, model.eval()(input_ids=ids).logits))
        return real(model, folder, example)

    monkeypatch.setattr(t, "verify_saved_adapter", keep)


@pytest.mark.parametrize(
    "family",
    ["llama3_2", "phi3_5", "gemma", "gemma3", "qwen3", "qwen3_5_nothink", "qwen3_instruct_2507"],
)
def test_a_run_leaves_an_adapter_that_peft_alone_loads(
    family, flags, tmp_path, tiny, capsys, monkeypatch
):
    targets, end = TRAINED.get(family, ([], "<end_of_turn>"))
    model = chat_model(tmp_path / "model", family, tiny)
    flags = [*flags, "--model_name", model, "--max_seq_len", "1000", "--max_steps", "3"]
    if targets:
        flags += ["--lora_target_modules", *targets]
    if family == "gemma":  # its template refuses them
        for name in ("train", "eval"):
            without_system_messages(tmp_path / f"{name}.jsonl")
    seen = []
    trained_logits(monkeypatch, seen)
    t.main(flags)
    out = capsys.readouterr().out
    assert "\ndone " in out and "failed" not in out  # mixtures of experts reply, too
    ids, wanted = seen[0]
    assert AutoTokenizer.from_pretrained(model).decode(ids[0, -1]) == end
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapter = PeftModel.from_pretrained(base, tmp_path / "output" / "final_lora").eval()
        found = adapter(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-5
    assert (found - untrained).abs().max() >= 1e-3


# ---- what is wrong with a model, and what with a line -------------------------------------------


def test_without_the_system_message_a_refused_model_trains(flags, tmp_path, tiny, capsys):
    """So the message is about the line that has one, although others come first."""
    model = chat_model(tmp_path / "model", "gemma", tiny)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    without_system_messages(tmp_path / "train.jsonl")
    flags = [*flags, "--dry_run", "--eval_file", "", "--model_name", model]
    flags += ["--max_seq_len", "1000"]
    t.main(flags)
    assert "a reply ends with <end_of_turn>" in capsys.readouterr().out
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(lines[:2]))
    said = refused(capsys, flags)
    assert "refuses the system message that" in said and "train.jsonl:14 has" in said


@pytest.mark.parametrize("form", ["system", "turns"])
def test_each_form_of_conversation_that_occurs_is_tried(flags, tmp_path, tiny, capsys, form):
    """A template may take the one and not the other; what does not occur does not matter."""
    fault = "{{ raise_exception('not this') }}{% endif %}"
    system = "{% if messages[0].role == 'system' %}" + fault
    turns = "{% if messages | map(attribute='role') | select('eq', 'user') | list | length > 1 %}"
    template = {"system": system, "turns": turns + fault}[form] + template_of("qwen3")
    model = chat_model(tmp_path / "model", "qwen3", tiny, template)
    hello = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    talks = {
        "plain": hello, "system": [{"role": "system", "content": "Be Nell."}, *hello],
        "turns": hello * 2,
    }  # fmt: skip
    files = {name: tmp_path / f"{name}.jsonl" for name in talks}
    for name, path in files.items():
        rows = [{"messages": hello}] * 3 + [{"messages": talks[name]}] * 2
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = [*flags, "--dry_run", "--eval_file", "", "--model_name", model]
    for name, path in files.items():
        if name != form:
            t.main([*flags, "--train_file", str(path)])
    said = refused(capsys, [*flags, "--train_file", str(files[form])])
    assert "MODEL_NAME" in said and f"{form}.jsonl:4" in said and "not this" in said
    assert ("first user message" in said) == (form == "system")


def test_a_system_message_that_is_left_out_is_said(flags, tmp_path, tiny, capsys):
    """Phi-3's first template did so: nobody would have noticed."""
    template = template_of("phi3_5").replace("message['role'] == 'system' and", "false and")
    model = chat_model(tmp_path / "model", "phi3_5", tiny, template)
    flags = [*flags, "--dry_run", "--model_name", model, "--lora_target_modules", *PHI_TARGETS]
    said = refused(capsys, flags)
    assert "leaves out the system message that" in said and "first user message" in said
    for name in ("train", "eval"):
        without_system_messages(tmp_path / f"{name}.jsonl")
    t.main(flags)


def test_an_end_that_nobody_named_is_shown_with_what_to_do(flags, tmp_path, tiny, capsys):
    """As a copy of Gemma without its generation_config.json."""
    model = chat_model(tmp_path / "model", "gemma3", tiny)
    (tmp_path / "model" / "generation_config.json").unlink()
    said = refused(capsys, [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"])
    assert "does not end a reply with <eos>, at which the model stops" in said
    assert 'ends with "<end_of_turn>\\n"' in said
    assert "eos_token_id in generation_config.json" in said


def test_what_a_template_refuses_in_a_line_is_said_of_the_line(flags, tmp_path, tiny, capsys):
    """A template may object to some words, as to tags of its own."""
    fault = "{{ raise_exception('no riddles') }}"
    template = "{% for m in messages %}{% if 'xyzzy' in m.content %}" + fault
    template += "{% endif %}{% endfor %}" + template_of("qwen3")
    model = chat_model(tmp_path / "model", "qwen3", tiny, template)
    path = tmp_path / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[4])
    row["prompt"][-1]["content"] += " xyzzy"
    path.write_text("\n".join([*lines[:4], json.dumps(row), *lines[5:]]), encoding="utf-8")
    said = refused(capsys, [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"])
    assert "MODEL_NAME" not in said and "no riddles" in said and "1 problem" in said
    assert re.match(r"\S*train\.jsonl:5: the model's chat template refuses", said)


# ---- a template that prints the day -------------------------------------------------------------


class Tomorrow(transformers.utils.chat_template_utils.datetime):
    @classmethod
    def now(cls, *_):
        return cls(2031, 5, 17)


def test_a_run_that_prints_the_day_is_refused_tomorrow_as_was_said(
    flags, tmp_path, tiny, capsys, monkeypatch
):
    def stop(*_, **__):
        raise SystemExit("stopped before the end")

    model = chat_model(tmp_path / "model", "llama3_2", tiny)
    flags = [*flags, "--model_name", model, "--max_seq_len", "1000", "--max_steps", "3"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(t, "publish", stop)
        t.main(flags)
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert f"warning the chat template of {model} prints the day's date" in said
    assert "cannot be resumed" in said and "Finish it today" in said and "local copy" in said
    with monkeypatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
        assert "the tokens of TRAIN_FILE was" in refused(capsys, flags)
    t.main(flags)  # today it goes on
    assert "going on from" in capsys.readouterr().out


def test_a_copy_with_a_fixed_date_is_as_the_warning_says(flags, tmp_path, tiny, capsys):
    template = re.sub(r"strftime_now\([^)]*\)", '"01 May 2031"', template_of("llama3_2"))
    model = chat_model(tmp_path / "model", "llama3_2", tiny, template)
    t.main([*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"])
    out = capsys.readouterr().out
    assert "prints the day" not in out and "Today Date: 01 May 2031" in out


# ---- layers with other names --------------------------------------------------------------------


def gpt2(folder):
    """Write a tiny GPT-2, whose matrices are Conv1D modules, with Llama 3's template."""
    tokenizer = tokenizer_of("llama3")
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=1024,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


OTHER_NAMES = {
    "phi3_5": (
        "gate_proj, k_proj, q_proj, up_proj, v_proj",
        "down_proj, gate_up_proj, o_proj, qkv_proj",
    ),
    "lfm2": (
        "down_proj, gate_proj, o_proj, up_proj",
        "in_proj, k_proj, out_proj, q_proj, v_proj, w1, w2, w3",
    ),
    "qwen3_instruct_2507": ("down_proj, gate_proj, up_proj", "k_proj, o_proj, q_proj, v_proj"),
    "gptoss": ("down_proj, gate_proj, up_proj", "k_proj, o_proj, q_proj, v_proj"),
    "gpt2": (
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "c_attn, c_fc, c_proj",
    ),
}


@pytest.mark.parametrize("family", OTHER_NAMES)
def test_other_names_are_listed_and_all_linear_is_offered(family, flags, tmp_path, tiny, capsys):
    folder = tmp_path / "model"
    model = gpt2(folder) if family == "gpt2" else chat_model(folder, family, tiny)
    said = refused(capsys, [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"])
    missing, there = OTHER_NAMES[family]
    assert f"LORA_TARGET_MODULES: no layer of the model is named {missing}. The layers " in said
    assert f'have {there}. For all of these write target_modules="all-linear" in lora' in said
    fused = "experts' down_proj and gate_up_proj are fused and cannot be named"
    assert (fused in said) == (family in ("qwen3_instruct_2507", "gptoss"))
    assert "Did you mean" not in said


@pytest.mark.parametrize("family", ["phi3_5", "gpt2", "qwen3_instruct_2507"])
def test_all_linear_is_planned_as_offered(family, flags, tmp_path, tiny, capsys):
    """With fused experts it needs LORA_DROPOUT 0, and PEFT says so."""
    change = ("target_modules=settings.LORA_TARGET_MODULES", 'target_modules="all-linear"')
    script = edited_script(tmp_path, change)
    folder = tmp_path / "model"
    model = gpt2(folder) if family == "gpt2" else chat_model(folder, family, tiny)
    flags = [*flags, "--dry_run", "--model_name", model, "--max_seq_len", "1000"]
    if family == "qwen3_instruct_2507":
        assert "lora_dropout" in refused(capsys, flags, script.main)
    script.main([*flags, "--lora_dropout", "0"])
    out = capsys.readouterr().out
    names = {"phi3_5": PHI_TARGETS, "gpt2": ["c_attn", "c_fc", "c_proj"]}
    for name in names.get(family, [*ATTENTION, "experts"]):
        assert re.search(rf"^ +{name} +2/2 ", out, re.MULTILINE)


# ---- float16 products ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Phi3", "Gemma3Text", "Mamba", "FalconMamba"])
def test_a_converted_model_computes_as_before(name, dtype, capsys):
    """Gemma scales its embeddings; Mamba casts to its head's type, and multiplies by itself."""
    sizes = {"hidden_size": 96, "tie_word_embeddings": name == "Gemma3Text"}
    if "Mamba" in name:
        sizes |= {"time_step_rank": 64, "state_size": 8, "intermediate_size": 192}
    plain, converted = (random_model(name, 256, **sizes).to(dtype).eval() for _ in range(2))
    converted = t.use_float16_products(converted)
    said = capsys.readouterr().out
    names = {"Gemma3Text": ["lm_head"], "Llama": [], "Phi3": []}.get(name, ["dt_proj", "lm_head"])
    assert ("the model's code looking at" in said) == bool(names)
    for one in names:
        assert re.search(rf"looking at.*\b{one}\b", " ".join(said.split()))
    narrow = []

    def note(module, inputs):
        narrow.extend(
            type(module).__name__
            for one in inputs
            if isinstance(one, torch.Tensor) and one.dtype == torch.float16
        )

    for module in converted.modules():
        module.register_forward_pre_hook(note)
    ids = torch.arange(1, 61).reshape(2, 30)
    embedded = [one.get_input_embeddings()(ids) for one in (plain, converted)]
    assert embedded[0].equal(embedded[1])
    with torch.no_grad():
        wanted, found = (one(input_ids=ids, use_cache=False).logits for one in (plain, converted))
    assert not narrow
    rounding = {torch.float32: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert found.dtype == wanted.dtype
    assert 0 < (found - wanted).norm() <= rounding * wanted.norm()
