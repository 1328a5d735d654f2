"""``wplfast fisher``: Hugging Face folders with data of every format, and functions, against the one-sample loop."""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_folders import LABELS, WORDS, model, saved, tokenizer
from oracle import assert_close, fisher_loop
from torch import Tensor

import wplfast
from wplfast import Fisher, cli
from wplfast.cli.estimate.tasks import kind_of

N = 11
RANDOM = random.Random(0)
TEXTS = [" ".join(RANDOM.choices(WORDS, k=RANDOM.randint(2, 12))) for _ in range(N)]
OTHERS = [" ".join(RANDOM.choices(WORDS, k=RANDOM.randint(1, 4))) for _ in range(N)]
CLASSES = [i % 3 for i in range(N)]
TAGS = [[(i + j) % 3 for j in range(len(text.split()))] for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are saved."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, columns: dict[str, list[Any]]) -> str:
    """Write records in the format of the path's suffix."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.endswith(".jsonl"):
        Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.endswith(".json"):
        Path(path).write_text(json.dumps(rows))
    elif path.endswith(".txt"):
        Path(path).write_text("\n\n".join(row["text"] for row in rows))
    elif path.endswith((".csv", ".tsv")):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def run(*arguments: str) -> Fisher:
    """Run the command; return the Fisher that it wrote."""
    assert cli.main(["fisher", *arguments, "-o", "F.safetensors", "--batch-size", "4"]) == 0
    assert not list(Path().glob("*.partial*"))
    return Fisher.load("F.safetensors")


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, written down once more."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


def inputs_of(kind: str, *texts: str) -> dict[str, Tensor]:
    """A sample's tokens, without padding."""
    encoded = tokenizer(brackets=not kind.startswith(("gpt2", "t5")))(*texts)
    return {key: torch.tensor([values]) for key, values in encoded.items()}


def causal(outputs: Any, labels: Tensor) -> Tensor:
    return token_loss(outputs.logits[:, :-1], labels[:, 1:])


CAUSAL = [(ids := inputs_of("gpt2", text), ids["input_ids"]) for text in TEXTS]
NAMED = [LABELS[i] for i in CLASSES]
SEVERAL = [[1.0, float(i % 2), 0.0] for i in range(N)]


def by_class(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="none")


#: name -> model, file, columns, samples of one each, their loss, further arguments.
TASKS: dict[str, tuple[str, str, dict[str, list[Any]], list[Any], Any, list[str]]] = {
    "causal, jsonl": ("gpt2", "d.jsonl", {"id": CLASSES, "text": TEXTS}, CAUSAL, causal, []),
    "causal, text": ("gpt2", "d.txt", {"text": TEXTS}, CAUSAL, causal, []),
    "causal, a column by name": ("gpt2", "d.json", {"story": TEXTS}, CAUSAL, causal, ["--text-field", "story"]),
    "causal, mean over tokens": (
        "gpt2", "d.jsonl", {"text": TEXTS}, CAUSAL, lambda o, t: causal(o, t) / (t.shape[1] - 1),
        ["--token-reduction", "mean"],
    ),
    "causal, cut": (
        "gpt2", "d.txt", {"text": TEXTS}, [({k: v[:, :5] for k, v in x.items()}, y[:, :5]) for x, y in CAUSAL], causal,
        ["--max-length", "5"],
    ),
    "classes, csv with names": (
        "classes", "d.csv", {"sentence": TEXTS, "label": NAMED},
        [(inputs_of("classes", text), torch.tensor([y])) for text, y in zip(TEXTS, CLASSES, strict=True)], by_class, [],
    ),
    "classes of pairs, tsv with numbers": (
        "classes", "d.tsv", {"a": TEXTS, "gold": CLASSES, "b": OTHERS},
        [(inputs_of("classes", *pair), torch.tensor([y])) for *pair, y in zip(TEXTS, OTHERS, CLASSES, strict=True)],
        by_class, ["--text-field", "a,b", "--label-field", "gold"],
    ),
    "classes by a decoder, parquet": (
        "gpt2 classes", "d.parquet", {"text": TEXTS, "label": CLASSES},
        [(inputs_of("gpt2", text), torch.tensor([y])) for text, y in zip(TEXTS, CLASSES, strict=True)], by_class, [],
    ),
    "several classes": (
        "several", "d.jsonl", {"text": TEXTS, "labels": SEVERAL},
        [(inputs_of("several", text), torch.tensor([y])) for text, y in zip(TEXTS, SEVERAL, strict=True)],
        lambda o, t: F.binary_cross_entropy_with_logits(o.logits, t.to(o.logits), reduction="none").sum(1), [],
    ),
    "a number": (
        "number", "d.csv", {"text": TEXTS, "score": [i / 7 for i in range(N)]},
        [(inputs_of("number", text), torch.tensor([[i / 7]])) for i, text in enumerate(TEXTS)],
        lambda o, t: (o.logits - t).square().sum(1) / 2, [],
    ),
    "tags, parquet": (
        "tags", "d.parquet", {"tokens": [text.split() for text in TEXTS], "ner_tags": TAGS},
        [(inputs_of("tags", text), torch.tensor([[-100, *y, -100]])) for text, y in zip(TEXTS, TAGS, strict=True)],
        lambda o, t: token_loss(o.logits, t), [],
    ),
    "a source and a target": (
        "t5", "d.jsonl", {"document": TEXTS, "summary": OTHERS},
        [
            ({**inputs_of("t5", source), "decoder_input_ids": F.pad(ids[:, :-1], (1, 0))}, ids)
            for source, target in zip(TEXTS, OTHERS, strict=True)
            for ids in [inputs_of("t5", target)["input_ids"]]
        ],
        lambda o, t: token_loss(o.logits, t), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_and_a_file_give_the_fisher_of_a_loop_without_padding(task: str, folders: Path) -> None:
    kind, path, columns, samples, loss, more = TASKS[task]
    fisher = run("--model", saved(kind, folders), "--data", write(path, columns), *more)
    assert fisher.n_samples == N
    module = model(kind).eval()
    if kind == "gpt2 classes":
        module.config.pad_token_id = 0
    assert_close(fisher, fisher_loop(module, samples, loss))


def test_masks_depend_on_the_sample_alone(folders: Path) -> None:
    from wplfast.cli.estimate.language import MaskedLM
    from wplfast.cli.estimate.tasks import Options

    texts = [" ".join(RANDOM.choices(WORDS, k=14)) for _ in range(40)]
    module = model("masked").eval()
    fisher = run("--model", saved("masked", folders), "--data", write("d.txt", {"text": texts}), "--seed", "3")
    task = MaskedLM(module, tokenizer(brackets=True), Options(None, None, None, "sum", 3))
    examples = [example for example in task.encode(list(enumerate(texts))) if example.counts]
    assert fisher.n_samples == len(examples) < 40  # some texts had no mask: they have no loss
    loop = fisher_loop(module, [task.collate([example]) for example in examples], lambda o, t: token_loss(o.logits, t))
    assert_close(fisher, loop)
    words = torch.tensor([example.inputs["input_ids"][1:-1] for example in task.encode([*enumerate(texts)])])
    labels = torch.tensor([example.label[1:-1] for example in task.encode([*enumerate(texts)])])
    chosen = labels >= 0
    assert 0.1 < chosen.double().mean() < 0.2
    assert 0.7 < (words[chosen] == 4).double().mean() < 0.92
    assert not (words[~chosen] == 4).any()


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_types_are_those_of_fisher_diagonal(fisher_type: str, folders: Path) -> None:
    data = write("d.jsonl", {"text": TEXTS, "label": CLASSES})
    arguments = ["--model", saved("classes", folders), "--data", data, "--fisher-type", fisher_type, "--mc-samples"]
    fisher = run(*arguments, "1" if fisher_type == "exact" else "3")
    batches = [(inputs_of("classes", text), torch.tensor([0])) for text in TEXTS]
    loss = wplfast.losses.cross_entropy
    exact = wplfast.fisher_diagonal(model("classes"), batches, loss, fisher_type="exact")
    if fisher_type == "exact":
        assert_close(fisher, {name: tensor.double() for name, tensor in exact.items()})
    else:
        assert torch.allclose(fisher.flat.sum(), exact.flat.sum(), rtol=0.4)
        again = run(*arguments, "3", "--save-every", "0")  # a portion for each batch changes no draw
        assert torch.allclose(again.flat, fisher.flat, rtol=1e-5, atol=1e-9)
        assert not torch.equal(run(*arguments, "3", "--seed", "1").flat, fisher.flat)


def test_samples_without_a_loss_are_left_out_and_said(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w1", *TEXTS, " ", "w2 " * 40]
    data = write("d.jsonl", {"text": texts})
    fisher = run("--model", saved("gpt2", folders), "--data", data, "--json", "--theta-hat", "--dtype", "float64")
    said = json.loads(capsys.readouterr().out)
    assert (said["samples"], said["left_out"], said["truncated"]) == (N + 1, 2, 1)
    assert said["trace"] == pytest.approx(float(fisher.flat.sum()))
    assert fisher["lm_head.weight" if "lm_head.weight" in fisher else "transformer.wte.weight"].dtype == torch.float64
    assert all(torch.equal(fisher.theta_hat[name].float(), p) for name, p in model("gpt2").named_parameters())
    cut = [*CAUSAL, (ids := inputs_of("gpt2", "w2 " * 16), ids["input_ids"])]
    assert_close(fisher, fisher_loop(model("gpt2").eval(), cut, causal))


def test_a_part_of_parameters_and_samples(folders: Path) -> None:
    data = write("d.jsonl", {"text": TEXTS})
    arguments = ["--model", saved("gpt2", folders), "--data", data, "--max-samples", "5"]
    fisher = run(*arguments, "--params", "*.ln_[12].*", "--params", "*wpe*")
    assert sorted(fisher) == sorted(
        n for n, _ in model("gpt2").named_parameters() if ".ln_1" in n or ".ln_2" in n or "wpe" in n
    )
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:5].tolist()
    loop = fisher_loop(model("gpt2").eval(), [CAUSAL[i] for i in kept], causal)
    assert_close(fisher, {name: loop[name] for name in fisher})
    assert fisher.n_samples == 5
    assert not torch.equal(run(*arguments, "--seed", "1")["transformer.wpe.weight"], fisher["transformer.wpe.weight"])


# ---- functions ------------------------------------------------------------------------------------------------------

MINE = """
import torch, wplfast
from torch import nn
from torch.utils.data import TensorDataset
torch.manual_seed(0)
X, Y = torch.randn(22, 4), torch.randint(0, 3, (22,))
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
def loss(outputs, targets): return wplfast.losses.cross_entropy(outputs, targets)
def batches(): return [(X[i : i + 5], Y[i : i + 5]) for i in range(0, 22, 5)]
def everything(): return model(), batches(), loss
def model_and_loss(): return model(), loss
def dataset(): return TensorDataset(X, Y)
def shuffled(): return torch.utils.data.DataLoader(TensorDataset(X, Y), 5, shuffle=True)
def with_loss(): return dataset(), loss
def folder_like():
    from hf_folders import model, tokenizer
    return model("gpt2"), tokenizer()
def fails(): return 1 / 0
def nothing(): pass
def none(): return model(), [], loss
def nan(): return model(), [(X * float("nan"), Y)], loss
def scalar(): return model(), batches(), lambda outputs, targets: loss(outputs, targets).mean()
NUMBER = 3
"""


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of a user's in the current directory, imported anew for each test."""
    (here / "mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    import mine as found

    yield found
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "mine:everything"],
        ["--model", "mine:model_and_loss", "--data", "mine:batches"],
        ["--model", "mine:model_and_loss", "--data", "mine:dataset"],
        ["--model", "mine:model_and_loss", "--data", "mine:shuffled"],
        ["--model", "mine:model", "--data", "mine:with_loss"],
    ],
)
def test_functions(mine: Any, arguments: list[str]) -> None:
    fisher = run(*arguments)
    assert fisher.n_samples == 22
    assert_close(fisher, fisher_loop(mine.model(), [(mine.X, mine.Y)], mine.loss))
    limited = run(*arguments, "--max-samples", "7")
    assert limited.n_samples == 7
    if "mine:shuffled" not in arguments:
        assert_close(limited, fisher_loop(mine.model(), [(mine.X[:7], mine.Y[:7])], mine.loss))


def test_a_function_may_give_model_and_tokenizer_for_a_file(mine: Any) -> None:
    fisher = run("--model", "mine:folder_like", "--data", write("d.jsonl", {"text": TEXTS}))
    assert_close(fisher, fisher_loop(model("gpt2").eval(), CAUSAL, causal))


def test_a_folder_takes_batches_of_a_function(folders: Path, mine: Any, here: Path) -> None:
    mine.causal = lambda: [{**inputs, "labels": labels} for inputs, labels in CAUSAL]
    assert_close(
        run("--model", saved("gpt2", folders), "--data", "mine:causal"),
        fisher_loop(model("gpt2").eval(), CAUSAL, causal),
    )


# ---- errors ---------------------------------------------------------------------------------------------------------

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"text": "w1 w2"}\n{"text": "w1',
    "list.jsonl": '{"text": "w1 w2"}\n["w1"]\n',
    "lacks.jsonl": '{"text": "w1 w2"}\n{"txt": "w1"}\n',
    "number.jsonl": '{"text": "w1 w2"}\n\n{"text": 7}\n',
    "other.jsonl": '{"body": "w1 w2", "n": 1}\n',
    "array.json": '[{"text": "w1 w2"}, 3]',
    "ragged.csv": "text,label\nw1 w2,1\nw1,2,3\n",
    "range.csv": "text,label\nw1 w2,1\nw3 w4,3\n",
    "unknown.csv": "text,label\nw1 w2,yes\nw3 w4,perhaps\n",
    "header.csv": "text,label\n",
    "latin.txt": b"w1 w\xff\n",
    "no.parquet": "PAR",
    "d.xml": "<a/>",
    "short.txt": "w1\n",
    "d.jsonl": '{"text": "w1 w2"}\n',
    "unequal.json": '[{"tokens": ["w1", "w2"], "tags": [1]}]',
}
WRONG = [
    ("gpt2", "missing.jsonl", [], r"missing\.jsonl: No such file"),
    ("gpt2", "empty.jsonl", [], r"empty\.jsonl holds no records"),
    ("gpt2", "broken.jsonl", [], r"broken\.jsonl, line 2: broken JSON: Unterminated string"),
    ("gpt2", "list.jsonl", [], r"list\.jsonl, line 2: a record must be an object .* got \['w1'\]"),
    ("gpt2", "lacks.jsonl", [], r"lacks\.jsonl, line 2: there is no 'text', only \['txt'\]"),
    ("gpt2", "number.jsonl", [], r"number\.jsonl, line 3: the text must be a text, got 7"),
    ("gpt2", "other.jsonl", [], r"no column for the text is called 'text' or .* \['body', 'n'\] with --text-field"),
    ("gpt2", "other.jsonl", ["--text-field", "txt"], r"no column 'txt' \(--text-field\), only \['body', 'n'\]"),
    ("gpt2", "d.jsonl", ["--text-field", "a,b"], r"takes 1 of them, got a, b"),
    ("gpt2", "d.jsonl", ["--label-field", "a"], r"takes no labels"),
    ("gpt2", "array.json", [], r"array\.json, record 2: a record must be an object"),
    ("classes", "ragged.csv", [], r"ragged\.csv, line 3: the header has 2 columns, this row 3"),
    ("classes", "range.csv", [], r"range\.csv, line 3: the label must be 0 to 2, as the model has them, got 3"),
    ("classes", "unknown.csv", [], r"line 3: the label must be one of the model's \('no', .*\) .* got 'perhaps'"),
    ("classes", "header.csv", [], r"header\.csv holds no records"),
    ("classes", "d.jsonl", [], r"no column for the label is called"),
    ("tags", "unequal.json", [], r"record 1: there must be a label for each of the 2 words, got 1 labels"),
    ("gpt2", "latin.txt", [], r"latin\.txt must be UTF-8: invalid start byte at byte 4"),
    ("gpt2", "no.parquet", [], r"no\.parquet is no whole Parquet file"),
    ("gpt2", "d.xml", [], r"must be one of \.jsonl, .*got '\.xml'"),
    ("gpt2", "short.txt", [], r"there is no sample that has a loss"),
    ("gpt2", "d.jsonl", ["--max-length", "17"], r"--max-length 17: the model has 16 positions"),
    ("gpt2", "d.jsonl", ["--params", "bert.*"], r"--params bert\.\* matches no parameter .* \['transformer"),
    ("gpt2", "d.jsonl", ["--device", "cuda:63"], r"--device cuda:63: torch sees \d+ GPUs"),
    ("gpt2", "d.jsonl", ["--fisher-type", "exact"], r"mc"),
    ("gpt2", "d.jsonl", ["--likelihood", "gaussian"], r"--likelihood is for functions"),
]


@pytest.mark.parametrize(("kind", "path", "more", "message"), WRONG)
def test_wrong_data_are_one_line_before_the_model_runs(
    kind: str, path: str, more: list[str], message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if path in FILES:
        content = FILES[path]
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["--model", saved(kind, folders), "--data", path, *more], message, capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Require exit code 2, one line, and no file."""
    capsys.readouterr()
    assert cli.main(["fisher", *arguments, "-o", "F.safetensors"]) == 2
    told = capsys.readouterr()
    assert re.fullmatch(r"wplfast fisher: error: .+\n", told.err), told.err
    assert re.search(message, told.err), told.err
    assert told.out == ""
    assert not Path("F.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent"], r"absent: there is no such folder, and it is no module:function"),
        (["--model", "absent:f"], r"there is no module 'absent' in "),
        (["--model", "mine:absent"], r"mine has no function 'absent'; it has \['model', 'loss'"),
        (["--model", "mine:NUMBER"], r"mine has no function 'NUMBER'"),
        (["--model", "mine:fails"], r"--model mine:fails: ZeroDivisionError: division by zero \(mine\.py, line \d+\)"),
        (["--model", "mine:nothing"], r"must return \(model, data, loss\), .* got NoneType"),
        (["--model", "mine:model"], r"--data is missing"),
        (["--model", "mine:model", "--data", "mine:batches"], r"Sequential is no Hugging Face model"),
        (["--model", "mine:everything", "--data", "mine:batches"], r"returns data already: leave --data out"),
        (
            ["--model", "mine:model", "--data", "mine:nothing"],
            r"must return batches, a Dataset, or \(either, loss\), got NoneType",
        ),
        (["--model", "mine:everything", "--text-field", "a"], r"--text-field is for data in a file"),
        (["--model", "mine:everything", "--dtype", "float64"], r"--dtype is for a model folder"),
        (["--model", "mine:none"], r"data is empty"),
        (["--model", "mine:nan"], r"the loss of sample 0 is nan"),
        (["--model", "mine:scalar"], r"one value per sample, shape \[N\]"),
        (["--model", "mine.py", "--data", "mine:batches"], r"mine\.py: is a file; a model is a Hugging Face folder"),
        (["--model", "empty", "--data", "mine:batches"], r"empty holds no config\.json"),
        (["--model", "adapter", "--data", "mine:batches"], r"adapter holds an adapter without its model"),
    ],
)
def test_wrong_models_and_functions_are_one_line(
    arguments: list[str], message: str, mine: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    refused(arguments, message, capsys)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("ReformerModelWithLMHead", "CausalLM"),
        ("MarianMTModel", "Seq2Seq"),
        ("BartForConditionalGeneration", "Seq2Seq"),
        ("BertForMaskedLM", "MaskedLM"),
        ("BertForSequenceClassification", "SequenceClassification"),
        ("BertForTokenClassification", "TokenClassification"),
    ],
)
def test_tasks_are_told_by_the_tables_of_transformers(architecture: str, task: str) -> None:
    assert kind_of(architecture).task == task


def rename_architecture(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))


def test_folders_that_lack_something(folders: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write("d.jsonl", {"text": TEXTS, "label": CLASSES})
    refused(["--model", saved("gpt2", here, with_tokenizer=False), "--data", data], "has no tokenizer", capsys)
    model("gpt2").transformer.save_pretrained(here / "headless")
    for unknown in ("GPT2Model", "LlavaForConditionalGeneration", "WhisperForConditionalGeneration", "MineForCausalLM"):
        rename_architecture(here / "headless", unknown)
        refused(
            ["--model", "headless", "--data", data],
            rf"{unknown} is none of the architectures whose task is known",
            capsys,
        )
    module = model("classes")
    module.config.architectures = ["BertForSequenceClassification"]
    weights = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("classifier")}
    module.save_pretrained(here / "random", state_dict=weights)
    refused(["--model", "random", "--data", data], r"random: the weights lack 2 .*'classifier\.bias'", capsys)
    tiny = model("gpt2")
    tiny.resize_token_embeddings(10)
    tiny.save_pretrained(here / "tiny")
    tokenizer().save_pretrained(here / "tiny")
    refused(["--model", "tiny", "--data", data], r"the tokenizer has the token \d+, the model 10 embeddings", capsys)


def test_what_is_there_is_not_lost(mine: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "notes.txt").write_text("mine")
    for output, message in [("notes.txt", "is no Fisher"), ("absent/F", "no such folder"), (".", "is a folder")]:
        assert cli.main(["fisher", "--model", "mine:everything", "-o", output]) == 2
        assert message in capsys.readouterr().err
    assert (here / "notes.txt").read_text() == "mine"
    run("--model", "mine:everything")
    run("--model", "mine:everything")  # a Fisher is replaced


def test_debug_shows_the_traceback(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WPLFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        cli.main(["fisher", "--model", "mine:fails", "-o", "F"])
