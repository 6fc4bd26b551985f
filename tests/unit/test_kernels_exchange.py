"""The local halves of an exchange: the kernels give what plain torch gives, for every shape of routing.

In the interpreter, and compiled where there is a GPU. Bits are equal but where fp32 sums are added: those are too,
since both add in rank order.
"""

import pytest
import torch

from accel_moe.dispatch import rows, rows_triton
from accel_moe.dispatch.rows import RowLayout, Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E, K, H = 12, 3, 40


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """rows.py takes its own road on a GPU, too: here it is the reference."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)


def routing(kind: str, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    if kind == "one rank":
        index = index % 3
    if kind == "no expert":
        index[:, 1] = E
        index[::2] = E + 5
    if kind == "stray":
        index[:, 1] = -1
        index[::3] = 2**40  # to int32, a rank
        index[1::3, 0] = -(2**40)
    return index.to(DEVICE).contiguous()


@pytest.mark.parametrize("kind", ["even", "one rank", "no expert", "stray"])
@pytest.mark.parametrize("tokens", [0, 1, 90])
@pytest.mark.parametrize("ranks, own", [(2, 0), (4, 2)])
def test_the_kernels_do_what_plain_torch_does(kind, tokens, ranks, own):
    index, e = routing(kind, tokens), E // ranks
    wanted_counts, needed = rows.count(index, e, ranks, 2**40)
    counts, blocks = rows_triton.count(index, e, ranks, 2**40)
    assert counts.tolist() == wanted_counts.tolist()
    total = int(counts[:, 0].sum())

    wanted_slot, wanted_copy = rows.place(index, needed, e, ranks, own)
    slot, copy = rows_triton.place(index, blocks, e, ranks, own)
    assert torch.equal(slot, wanted_slot)
    assert torch.equal(copy[:total], wanted_copy[:total])

    stays = int(counts[own, 0])
    leaves = total - stays
    source = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = torch.rand(tokens, K, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    layout = RowLayout(H, source.dtype, K, weights.dtype, with_index=True)
    packed = []
    for step in (rows.pack, rows_triton.pack):
        parts = [layout.view(layout.empty(n, source.device)) for n in (leaves, stays)]
        step(source, wanted_copy, index, weights, *parts, e, ranks)
        packed.append([t for part in parts for t in part])
    for found, wanted in zip(packed[1], packed[0]):
        assert torch.equal(found, wanted)

    back = RowLayout(H, source.dtype, K, weights.dtype)
    returned, kept = back.view(back.empty(leaves, source.device)), Rows(packed[0][3] * 2, packed[0][4].contiguous())
    none = returned._replace(values=returned.values[:0], weights=returned.weights[:0])
    for step in (rows.pack, rows_triton.pack):
        step(packed[0][0], None, None, packed[0][1].contiguous(), returned, none, e, 1)
        assert torch.equal(returned.values, packed[0][0]) and torch.equal(returned.weights, packed[0][1])
    wanted_home = rows.combine(returned, kept, wanted_slot, index, e)
    home = rows_triton.combine(returned[:2], kept[:2], wanted_slot, index, e)
    for found, wanted in zip(home, wanted_home):
        assert torch.equal(found, wanted)


def test_rows_without_weights_or_without_values():
    index, e = routing("even", 9), E // 2
    _, needed = rows.count(index, e, 2, 0)
    slot, copy = rows.place(index, needed, e, 2, 0)
    source, weights = torch.randn(9, H, device=DEVICE), torch.rand(9, K, device=DEVICE)
    leaves = int((slot[:, 1] >= 0).sum())
    stays = int((slot[:, 0] >= 0).sum())
    for hidden, dtype in ((H, None), (0, weights.dtype)):
        layout = RowLayout(hidden, source.dtype, K, dtype)
        results = []
        for module in (rows, rows_triton):
            sent, own = (layout.view(layout.empty(n, source.device)) for n in (leaves, stays))
            module.pack(source[:, :hidden], copy, None, weights if dtype else None, sent, own, e, 2)
            parts = (sent[:2], own[:2]) if module is rows_triton else (sent, own)
            home = module.combine(*parts, slot, index, e)
            results.append([t for t in (*sent, *own, *home) if t is not None])
        for found, wanted in zip(results[1], results[0]):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_part_of_a_row_starts_at_a_multiple_of_16_bytes(dtype):
    layout = RowLayout(7, dtype, 3, torch.float32, with_index=True)
    parts = layout.view(layout.empty(2, torch.device("cpu")))
    assert all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in parts if t is not None)
    assert RowLayout(7, dtype).width == 7  # rows alone are as wide as they are


@pytest.mark.parametrize("kind", ["even", "one rank", "no expert", "stray"])
@pytest.mark.parametrize("tokens", [0, 1, 90])
@pytest.mark.parametrize("rest", [0, 3])
def test_the_kernels_of_an_all_gather_do_what_plain_torch_does(kind, tokens, rest):
    index, top, count = routing(kind, tokens), 2, max(1, tokens + rest)
    source = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = torch.rand(tokens, K, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    layout = RowLayout(H, source.dtype, K, weights.dtype, with_index=True)
    buffers = [layout.empty(top + count, source.device).fill_(7.0) for _ in range(2)]
    for step, buffer in zip((rows.fill, rows_triton.fill), buffers):
        step(layout.view(buffer), top, count, source, index, weights, E)
    assert buffers[0][:top].eq(7.0).all() and torch.equal(buffers[0][:top], buffers[1][:top])
    filled = [[t[top:] for t in layout.view(buffer)] for buffer in buffers]
    for found, wanted in zip(filled[1], filled[0]):
        assert torch.equal(found, wanted)

    wanted = rows.own_slots(Rows(*filled[0]), 4, 4)
    found = rows_triton.own_slots(filled[0][2], filled[0][1], 4, 4)
    assert found[0].dtype == torch.long
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert int(found[2].sum()) == int(wanted[2].sum()) == int(((index >= 4) & (index < 8)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, *[torch.bfloat16] * (DEVICE == "cuda")], ids=str)  # interpreted: fp32
@pytest.mark.parametrize(("ranks", "own_rank"), [(2, 0), (2, 1), (4, 2)])
def test_the_sum_over_ranks_is_that_of_plain_torch(ranks, own_rank, dtype):
    numbers = torch.Generator().manual_seed(ranks)
    own, others = (torch.randn(n, 37, 5, generator=numbers).to(DEVICE, dtype) for n in (1, ranks - 1))
    found, wanted = torch.empty_like(own[0]), torch.empty_like(own[0].cpu())
    rows_triton.sum_over_ranks(own[0], others, own_rank, found)
    rows.sum_over_ranks(own[0].cpu(), others.cpu(), own_rank, wanted)
    assert torch.equal(found.cpu(), wanted)  # the same order, fp32 throughout
