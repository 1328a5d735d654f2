"""What a sample is: documents packed into rows, pairs, graphs and episodes, one for each entry of the losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import ce, mlp
from oracle import assert_close
from torch import nn

import wplfast
from wplfast.errors import CoupledSamplesError
from wplfast.fisher.packing import packed
from wplfast.losses import sample_ids

VOCABULARY = 11


class Packed(nn.Module):
    """A small decoder with a tied head; tokens attend to their own document alone, positions start with it."""

    def __init__(self, width=8, heads=2, is_causal=True):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(16, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids, position_ids, attention_mask=None):
        h = self.tokens(input_ids) + self.places(position_ids)
        n, t = input_ids.shape
        ids = sample_ids(position_ids, attention_mask).expand(n, t)
        q, k, v = self.qkv(self.norm(h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = (ids[:, :, None] == ids[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(2))
        return self.head(h)


def documents(lengths):
    return [torch.randint(0, VOCABULARY, (n,)) for n in lengths]


def pack(rows, length=None):
    """Return a batch of documents in rows, padded at the right to one length."""
    length = length or max(sum(map(len, row)) for row in rows)
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
    batch["labels"] = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        used = sum(map(len, row))
        batch["input_ids"][i, :used] = batch["labels"][i, :used] = torch.cat(row)
        batch["position_ids"][i, :used] = torch.cat([torch.arange(len(d)) for d in row])
        batch["attention_mask"][i, :used] = 1
    return batch


def with_ids(batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = sample_ids(batch["position_ids"], batch["attention_mask"])
    return inputs, {"labels": batch["labels"], "ids": ids}


def alone(model, docs, loss, weights=None):
    """The one-document loop: one forward and backward pass for each, by ordinary autograd."""
    weights = [1.0] * len(docs) if weights is None else weights
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for doc, weight in zip(docs, weights, strict=True):
        outputs = model(doc[None], torch.arange(len(doc))[None])
        gradients = torch.autograd.grad(loss(outputs, doc[None]).sum(), list(model.parameters()), allow_unused=True)
        for value, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                value += weight * gradient**2 / sum(weights)
    return total


ROWS = [(3, 5, 2), (4, 4), (6, 1, 3), (2,)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shift", [True, False])
def test_packed_documents_are_samples(reduction, shift):
    model = Packed().double()
    rows = [documents(lengths) for lengths in ROWS]
    batches = [pack(rows[:2]), pack(rows[2:]), pack(rows[:1], 12), pack(rows[3:])]
    docs = [doc for part in (rows[:2], rows[2:], rows[:1], rows[3:]) for row in part for doc in row]
    fisher = wplfast.fisher_diagonal(
        model,
        batches,
        lambda o, y: ce(o, y["labels"], shift=shift, token_reduction=reduction, sample_ids=y["ids"]),
        unpack=with_ids,
        samples="losses",
    )
    assert fisher.n_samples == len(docs)
    expected = alone(model, docs, lambda o, y: ce(o, y, shift=shift, token_reduction=reduction))
    assert_close(fisher, expected, rtol=1e-9, model_rtol=1e-9)


def by_index(losses, ids, n):
    return torch.zeros(n, dtype=losses.dtype).index_add(0, ids.reshape(-1), losses.reshape(-1))


def by_mask(losses, ids, n):
    return ((ids.reshape(1, -1) == torch.arange(n)[:, None]) * losses.reshape(-1)).sum(1)


def by_product(losses, ids, n):
    return F.one_hot(ids.reshape(-1), n).to(losses.dtype).t() @ losses.reshape(-1)


def by_slices(losses, ids, n):
    return torch.stack([part.sum() for part in losses.reshape(-1).split(ids.reshape(-1).bincount().tolist())])


def by_segments(losses, ids, n):
    return torch.segment_reduce(losses.reshape(-1), "sum", lengths=ids.reshape(-1).bincount(minlength=n))


@pytest.mark.parametrize("total", [by_index, by_mask, by_product, by_slices, by_segments])
def test_documents_that_lie_elsewhere_in_the_next_batch(total):
    """As many documents of as many tokens in all, first all of one length: what was measured must not be trusted."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, VOCABULARY)).double()
    lengths = [(4, 4, 4), (4, 4, 4), (3, 5, 4), (1, 1, 10), (4, 4, 4), (4, 7, 1)]
    data = [documents(some) for some in lengths]

    def loss(outputs, y):
        tokens = F.cross_entropy(outputs.flatten(0, -2), y[0].flatten(), reduction="none")
        return total(tokens, y[1], 3)

    batches = [(torch.cat(d)[None], (torch.cat(d)[None], sample_ids(pack([d])["position_ids"]))) for d in data]
    fisher = wplfast.fisher_diagonal(model, batches, loss, samples="losses")
    docs = [doc for some in data for doc in some]
    model.forward = lambda x, _: nn.Sequential.forward(model, x)
    assert_close(fisher, alone(model, docs, ce), rtol=1e-9, model_rtol=1e-9)


def test_an_accumulator_measures_documents_anew():
    model = Packed().double()
    data = [documents(lengths) for lengths in ((4, 4, 4), (4, 4, 4), (3, 5, 4), (2, 2, 8))]
    with wplfast.FisherAccumulator(model, samples="losses") as acc:
        for docs in data:
            batch = pack([docs])
            ids = sample_ids(batch["position_ids"])
            logits = model(batch["input_ids"], batch["position_ids"])
            losses = F.cross_entropy(logits[0], batch["labels"][0], reduction="none")
            acc.backward(by_mask(losses, ids, 3))
    expected = alone(model, [doc for docs in data for doc in docs], ce)
    assert_close(acc.result(), expected, rtol=1e-9, model_rtol=1e-9)
    with pytest.raises(ValueError, match="samples must be 'batch' or 'losses', got 'rows'"):
        wplfast.FisherAccumulator(model, samples="rows")


def test_weights_and_max_samples_count_documents():
    model, rows = Packed().double(), [documents(lengths) for lengths in ROWS]
    docs = [doc for row in rows for doc in row]
    weights = torch.rand(len(docs), dtype=torch.float64)

    def loss(outputs, y):
        return ce(outputs, y["labels"], sample_ids=y["ids"])

    both = pack(rows[:2]), pack(rows[2:])
    weighted = [(*with_ids(both[0]), weights[:5]), (*with_ids(both[1]), weights[5:])]
    fisher = wplfast.fisher_diagonal(model, weighted, loss, samples="losses")
    assert_close(fisher, alone(model, docs, ce, weights.tolist()), rtol=1e-9, model_rtol=1e-9)
    fewer = wplfast.fisher_diagonal(model, both, loss, unpack=with_ids, samples="losses", max_samples=7)
    assert fewer.n_samples == 7
    assert_close(fewer, alone(model, docs[:7], ce), rtol=1e-9, model_rtol=1e-9)
    with pytest.raises(ValueError, match=r"weights must have shape \[5\] as losses, got \[2\]"):
        wplfast.fisher_diagonal(model, [(*with_ids(both[0]), weights[:2])], loss, samples="losses")


def test_documents_that_see_each_other_are_coupled():
    """Ordinary causal attention over a packed row: the losses are no functions of their own documents."""
    model = Packed().double()
    batch = pack([documents((3, 5, 2))])
    inputs, y = with_ids(batch)
    inputs = {"input_ids": inputs["input_ids"], "position_ids": torch.arange(10)[None]}
    with pytest.raises(CoupledSamplesError, match=r"coupled at .*do documents attend to each other"):
        wplfast.fisher_diagonal(
            model, [(inputs, y)], lambda o, y: ce(o, y["labels"], sample_ids=y["ids"]), samples="losses"
        )


def test_drawn_labels_of_documents():
    model = Packed().double()
    inputs, y = with_ids(pack([documents((3, 5, 2)), documents((4, 4))]))

    def sampler(outputs, generator):
        drawn = torch.multinomial(outputs.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
        return {"labels": drawn.view(outputs.shape[:-1]), "ids": y["ids"]}

    fisher = wplfast.fisher_diagonal(
        model,
        [(inputs, y)],
        lambda o, y: ce(o, y["labels"], sample_ids=y["ids"]),
        fisher_type="mc",
        likelihood=sampler,
        mc_samples=2,
        samples="losses",
    )
    assert fisher.n_samples == 5
    assert all(bool((f >= 0).all()) for f in fisher.values())


# ---- samples that are no documents -------------------------------------------------------------------------


def loop(model, samples, loss):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in samples:
        for value, gradient in zip(
            total.values(), torch.autograd.grad(loss(sample).sum(), list(model.parameters())), strict=True
        ):
            value += gradient**2 / len(samples)
    return total


@pytest.mark.parametrize("interleaved", [True, False])
def test_preference_pairs(interleaved):
    """Two rows a loss: chosen and rejected answers, one after the other or in halves."""
    model = mlp(torch.float64)
    batches = [torch.randn(2 * n, 6, dtype=torch.float64) for n in (4, 4, 3, 1)]

    def loss(outputs, _):
        scores = outputs[:, 0]
        good, bad = (scores[::2], scores[1::2]) if interleaved else scores.chunk(2)
        return -F.logsigmoid(good - bad)

    fisher = wplfast.fisher_diagonal(model, [(x, None) for x in batches], loss, samples="losses")
    assert fisher.n_samples == 12
    pairs = [p for x in batches for p in (x.view(-1, 2, 6) if interleaved else torch.stack(x.chunk(2), 1))]
    assert_close(fisher, loop(model, pairs, lambda pair: loss(model(pair), None)), rtol=1e-9, model_rtol=1e-9)


def test_episodes_of_any_length():
    model, lengths = mlp(torch.float64), [(3, 1, 6), (5, 5), (2, 4, 1, 1)]
    batches = [[torch.randn(n, 6, dtype=torch.float64) for n in some] for some in lengths]

    def loss(outputs, lengths):
        return torch.stack([part.log_softmax(-1)[:, 0].sum() for part in outputs.split(lengths.tolist())])

    data = [(torch.cat(some), torch.tensor([len(e) for e in some])) for some in batches]
    fisher = wplfast.fisher_diagonal(model, data, loss, samples="losses")
    episodes = [e for some in batches for e in some]
    expected = loop(model, episodes, lambda e: loss(model(e), torch.tensor([len(e)])))
    assert fisher.n_samples == len(episodes)
    assert_close(fisher, expected, rtol=1e-9, model_rtol=1e-9)


def test_exact_needs_a_row_of_outputs_for_each_loss():
    model, x = mlp(), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"one loss for each row of the outputs, \[4\], got \[2\]|-log p"):
        wplfast.fisher_diagonal(
            model, [(x, None)], lambda o, y: o[:, 0].view(2, 2).sum(1), fisher_type="exact", samples="losses"
        )


# ---- losses and numbers ------------------------------------------------------------------------------------


def test_numbers_of_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [3, 4, 0, 1, 2], [2, 3, 2, 3, 4]])
    expected = [[0, 0, 0, 1, 1], [2, 3, 3, 3, 3], [4, 4, 5, 5, 5], [6, 6, 7, 7, 7]]
    assert sample_ids(positions).tolist() == expected
    assert sample_ids(positions[0]).tolist() == [0, 0, 0, 1, 1]
    assert sample_ids(positions[0].to(torch.uint8)).tolist() == [0, 0, 0, 1, 1]
    left = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 0, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert sample_ids(left, mask).tolist() == [[-1, -1, 0, 0, 0], [1, 1, 1, 2, -1]]
    assert sample_ids(left, mask.bool()).tolist() == sample_ids(left, mask).tolist()
    assert sample_ids(torch.tensor([0, 1, 0, 1, 2]), mask).tolist() == [[-1, -1, 0, 0, 0], [1, 1, 2, 2, -1]]
    assert sample_ids(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(2, 3),), TypeError, "position_ids must hold integers, got float32"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 3)), TypeError, "attention_mask must hold integers"),
        ((torch.zeros(3, 2, 3).long(),), ValueError, r"\[N, T\] or \[T\], got \[3, 2, 3\]"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 1, 3, 3).long()), ValueError, "must be"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 4).long()), ValueError, "must be"),
        ((torch.zeros(2, 3).long(), torch.zeros(4, 3).long()), ValueError, "must be"),
    ],
)
def test_numbers_of_what_are_no_positions(arguments, error, match):
    with pytest.raises(error, match=match):
        sample_ids(*arguments)


def test_a_loss_for_each_document():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    ids = torch.tensor([[9, 9, 4, 4, 4], [-1, 6, 6, 6, -1]])
    spans = [(0, 0, 2), (0, 2, 5), (1, 1, 4)]
    parts = [(logits[r : r + 1, a:b], targets[r : r + 1, a:b]) for r, a, b in spans]
    for options in ({}, {"shift": True}, {"token_reduction": "mean"}, {"shift": True, "token_reduction": "mean"}):
        expected = torch.cat([ce(*part, **options) for part in parts])
        torch.testing.assert_close(ce(logits, targets, sample_ids=ids, **options), expected)
    # flattened; of the same pattern in each row; interrupted; with ignored targets; without any document
    flat = ce(logits[0], targets[0], sample_ids=ids[0], shift=True)
    torch.testing.assert_close(flat, torch.cat([ce(*part, shift=True) for part in parts[:2]]))
    same = ce(logits, targets, sample_ids=torch.tensor([[0, 0, 1, 1, -1]]))
    rows = [ce(logits[r : r + 1, a:b], targets[r : r + 1, a:b]) for r in (0, 1) for a, b in ((0, 2), (2, 4))]
    torch.testing.assert_close(same, torch.cat(rows))
    torn = ce(logits[:1], targets[:1], sample_ids=torch.tensor([[0, 0, 1, 0, 0]]), shift=True)
    expected = ce(logits[:1, :2], targets[:1, :2], shift=True) + ce(logits[:1, 3:], targets[:1, 3:], shift=True)
    torch.testing.assert_close(torn, torch.cat([expected, expected.new_zeros(1)]))
    ignored = ce(logits, targets.index_fill(1, torch.tensor([0, 1]), 255), sample_ids=ids, ignore_index=255)
    assert ignored[0] == 0
    torch.testing.assert_close(ignored[1:2], ce(*parts[1]))
    assert ce(logits, targets, sample_ids=torch.full((2, 5), -1)).shape == (0,)
    assert ce(logits, targets, sample_ids=ids.int()).shape == (3,)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], ValueError, "have 0 in several rows: number the documents over the whole"),
        ([[0, 1]], ValueError, r"must have the targets' shape, \[2, 5\], or \[1, 5\], got \[1, 2\]"),
        ([[0.0] * 5] * 2, TypeError, "sample_ids must hold integers"),
    ],
)
def test_numbers_that_do_not_fit(ids, error, match):
    with pytest.raises(error, match=match):
        ce(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), sample_ids=torch.tensor(ids))


# ---- packed rows that are taken for samples ----------------------------------------------------------------

T = 6
IDS = torch.zeros(2, T, dtype=torch.long)
RESTARTS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
ALL = torch.ones(2, T, dtype=torch.long)
RISING = torch.arange(T)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS, "position_ids": RESTARTS},
        {"input_ids": IDS, "position_ids": RESTARTS.int(), "attention_mask": ALL},
        {"input_ids": IDS, "position_ids": RESTARTS[:1]},
        {"input_ids": IDS, "position_ids": RESTARTS[0], "attention_mask": ALL.bool()},
        {"input_ids": IDS, "position_ids": RESTARTS, "attention_mask": torch.ones(2, 1, T, T)},
        {"input_ids": IDS, "position_ids": RESTARTS, "attention_mask": torch.zeros(2, T)},
        {"input_ids": IDS[:1], "position_ids": torch.tensor([[4, 5, 0, 1, 2, 3]])},  # begins inside a document
        {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 0, 1, 2, 0, 0]]), "attention_mask": ALL[:1]},
        {"inputs_embeds": torch.zeros(2, T, 3), "position_ids": RESTARTS},
        {"x": torch.zeros(2, T, 3), "position_ids": RESTARTS},
        {"pixel_values": torch.zeros(2, 3, 4, 4), "input_ids": IDS, "position_ids": RESTARTS},
        {"tokens": IDS, "input_pos": RESTARTS},
        {"input_ids": IDS, "position_ids": RESTARTS.expand(3, 2, T)},  # time, height, width
        {"input_ids": IDS[:1], "position_ids": RESTARTS[:1].numpy()},
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
        {"input_ids": IDS[:1], "cu_seqlens": [0, 3, 6]},
        {"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 3, 6])},
        {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 3, 6, 12])},
        {"x": torch.zeros(1, T, 3), "cu_seqlens": torch.tensor([0, 3, 6])},
        {"input_ids": IDS, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])},
        ({"input_ids": IDS, "position_ids": RESTARTS},),
    ],
)
def test_packed_rows_are_refused(inputs):
    assert packed(inputs) is not None


@pytest.mark.parametrize(
    "inputs",
    [
        IDS,
        (IDS, RESTARTS),
        {"input_ids": IDS},
        {"input_ids": IDS, "position_ids": None, "cu_seqlens": None},
        {"input_ids": IDS, "position_ids": RISING},
        {"input_ids": IDS, "position_ids": RISING[None]},
        {"input_ids": IDS, "position_ids": RISING.expand(2, T)},
        {"input_ids": IDS, "position_ids": RISING + 2},
        {"input_ids": IDS, "position_ids": RISING.flip(0)},
        {
            "input_ids": IDS,
            "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]]),
        },  # padded at the left
        {"input_ids": IDS, "position_ids": torch.tensor([[-1, -1, 0, 1, 2, 3]])},
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 1, 1]])},  # at the right
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 2, 2, 2], [0, 1, 0, 0, 0, 0]])},
        {"input_ids": IDS, "position_ids": RESTARTS, "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])},
        {"input_ids": IDS, "position_ids": RESTARTS, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])},
        {
            "input_ids": IDS,
            "position_ids": RESTARTS,
            "attention_mask": torch.tensor([[0.0] * 3 + [-1e9] * 3, [0.0] * 6]),
        },
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 2, 2, 3], [0, 0, 0, 0, 1, 2]])},  # around an image
        {"input_ids": IDS, "position_ids": torch.stack([RISING.expand(2, T), RESTARTS, RESTARTS])},  # height, width
        {"patches": torch.zeros(2, T, 3), "position_ids": RESTARTS},
        {"pixel_values": torch.zeros(2, T, 3), "position_ids": RESTARTS},  # columns of patches
        {"pixel_values": torch.zeros(2, T, 3), "position_ids": torch.zeros(2, T, 2).long()},
        {"input_ids": IDS, "position_ids": RESTARTS.float()},
        {"input_ids": IDS[:, :0], "position_ids": RESTARTS[:, :0]},
        {"input_ids": IDS[:, :1], "position_ids": RESTARTS[:, :1]},
        {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 6, 12])},
        {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 6, 12, 12, 12])},
        {
            "input_ids": IDS[:1],
            "cu_seqlens": torch.tensor([0, 4, 6]),
            "attention_mask": torch.tensor([[1] * 4 + [0] * 2]),
        },
        {"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 6])},
        {"input_ids": IDS, "seq_idx": torch.tensor([[0] * 6, [1] * 6])},
        {"input_ids": IDS, "seq_idx": torch.tensor([[0, 0, 0, 0, -1, -1]] * 2)},
        {"input_ids": IDS, "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)},
        {"input_ids": IDS, "max_length_q": 3},
    ],
)
def test_rows_of_one_document_are_not_refused(inputs):
    assert packed(inputs) is None


def test_packed_rows_name_the_option():
    model, batch = Packed(), pack([documents((3, 5, 2)), documents((4, 4))])
    with pytest.raises(
        ValueError, match=r"several documents \(position_ids \[2, 10\]\).*samples='losses'.*sample_ids=ids"
    ):
        wplfast.fisher_diagonal(model, [batch], ce)
    with pytest.raises(ValueError, match=r"one loss per sample, shape \[N\], got \[3\].*pass samples='losses'"):
        wplfast.fisher_diagonal(nn.Linear(6, 4), [(torch.randn(1, 10, 6), None)], lambda o, _: o[0].sum(1)[:3])
    with pytest.raises(ValueError, match="samples must be 'batch' or 'losses', got 'documents'"):
        wplfast.fisher_diagonal(model, [batch], ce, samples="documents")


def test_padded_rows_with_positions_are_samples():
    """Hugging Face's padding at the left: positions under the mask are 1."""
    model = Packed().double()
    docs = documents((3, 5))
    batch = pack([[docs[0]], [docs[1]]])
    left = {name: value.clone() for name, value in batch.items()}
    for name in left:
        left[name][0] = left[name][0].roll(2)
    left["position_ids"][0, :2] = 1
    for given in (batch, left):
        fisher = wplfast.fisher_diagonal(model, [given], ce)
        assert fisher.n_samples == 2
        assert_close(fisher, alone(model, docs, ce), rtol=1e-9, model_rtol=1e-9)


class NodeNet(nn.Module):
    """A loss for each node, which its neighbours take part in; ``pool`` makes one of each graph."""

    def __init__(self, pool=False):
        super().__init__()
        self.a, self.b, self.pool = nn.Linear(3, 4), nn.Linear(4, 2), pool

    def forward(self, x, edges, graph):
        h = torch.tanh(self.a(x))
        h = self.b(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return h.new_zeros(int(graph.max()) + 1, 2).index_add(0, graph, h) if self.pool else h


def one_by_hand(model, inputs, y, samples):
    with wplfast.FisherAccumulator(model, samples=samples) as acc:
        acc.backward(ce(model(*inputs), y))
        return acc.result()


def in_one_call(model, inputs, y, samples):
    return wplfast.fisher_diagonal(model, [(inputs, y)], ce, samples=samples)


@pytest.mark.parametrize("run", [one_by_hand, in_one_call])
def test_nodes_of_a_graph_are_told_that_graphs_are_samples(run):
    x, graph = torch.randn(10, 3).double(), torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    edges = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9], [1, 2, 2, 3, 4, 0, 6, 7, 7, 5, 9, 8]])
    advice = "one loss for each such sample and pass samples='losses'"
    with pytest.raises(CoupledSamplesError, match="mixes samples") as found:
        run(NodeNet().double(), (x, edges, graph), torch.randint(2, (10,)), "batch")
    assert advice in str(found.value)
    assert "samples='batch'" not in str(found.value)
    assert ("use fisher_diagonal" in str(found.value)) == (run is one_by_hand)
    with pytest.raises(CoupledSamplesError, match="so a graph is a sample, with one loss for each") as found:
        run(NodeNet().double(), (x, edges, graph), torch.randint(2, (10,)), "losses")
    assert advice not in str(found.value)
    model, y = NodeNet(pool=True).double(), torch.randint(2, (3,))
    fisher = run(model, (x, edges, graph), y, "losses")  # as it was told
    losses = ce(model(x, edges, graph), y)
    gradients = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = (sum(g.square() for g in of_all) / 3 for of_all in zip(*gradients, strict=True))
    assert_close(fisher, dict(zip(dict(model.named_parameters()), expected, strict=True)), 1e-9, 1e-9)
