"""Layers with a state: a sequence in pieces is the sequence, packed ones are alone, weights learn."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import foveal as fv
from foveal.layers import (
    AdvisorAttention,
    BasedAttention,
    CausalAttention,
    CosFormerAttention,
    CottentionLayer,
    DiagAttention,
    DiJiangAttention,
    FastAttention,
    FeedForwardKernelAttention,
    GatedDeltaNet,
    HybridStack,
    KimiDeltaAttention,
    LatentAttention,
    LightningAttention,
    LocalLinearAttention,
    MLSTMLayer,
    NormAttention,
    ParallaxAttention,
    PerformerAttention,
    RATAttention,
    ShortConvolution,
    SpectralAttention,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TitansMemory,
    TransNormerBlock,
    TransNormerLLMBlock,
    kimi_linear_stack,
    sparse_linear_stack,
)

DIM = 12
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "KimiDeltaAttention": lambda: KimiDeltaAttention(DIM, 2),
    "KimiDeltaAttention, sizes": lambda: KimiDeltaAttention(
        DIM, 2, head_dim=5, value_dim=3, value_heads=4, conv=2, largest_write=2.0
    ),
    "KimiDeltaAttention, bounded": lambda: KimiDeltaAttention(DIM, 2, least_log_decay=-5.0),
    "GatedDeltaNet": lambda: GatedDeltaNet(DIM, 3),
    "GatedDeltaNet, grouped": lambda: GatedDeltaNet(DIM, 2, head_dim=4, value_heads=4),
    "LightningAttention": lambda: LightningAttention(DIM, 3),
    "LightningAttention, relative": lambda: LightningAttention(DIM, 3, relative=True),
    "NormAttention": lambda: NormAttention(DIM, 2),
    "DiagAttention": lambda: DiagAttention(DIM, 2, block=4),
    "TransNormerBlock, diag": lambda: TransNormerBlock(DIM, 2, "diag", block=4),
    "TransNormerBlock, norm": lambda: TransNormerBlock(DIM, 2),
    "TransNormerLLMBlock": lambda: TransNormerLLMBlock(DIM, 2),
    "MLSTMLayer": lambda: MLSTMLayer(DIM, 2),
    "MLSTMLayer, sigmoid": lambda: MLSTMLayer(DIM, 2, rule=fv.MLSTM("sigmoid", normalised=False)),
    "BasedAttention": lambda: BasedAttention(DIM, 2, feature_dim=4),
    "PerformerAttention": lambda: PerformerAttention(DIM, 2, features=9),
    "CosFormerAttention": lambda: CosFormerAttention(DIM, 2, limit=32),
    "CottentionLayer": lambda: CottentionLayer(DIM, 2),
    "DiJiangAttention": lambda: DiJiangAttention(DIM, 2),
    "FastAttention": lambda: FastAttention(DIM, 2),
    "SpectralAttention": lambda: SpectralAttention(DIM, 2, causal=True),
    "FeedForwardKernelAttention": lambda: FeedForwardKernelAttention(DIM, 2, causal=True),
    "CausalAttention": lambda: CausalAttention(DIM, 2),
    "CausalAttention, window": lambda: CausalAttention(
        DIM, 4, kv_heads=2, head_dim=4, window=5, rotary_base=100.0
    ),
    "LatentAttention": lambda: LatentAttention(
        DIM, 2, latent_dim=5, head_dim=4, shared_dim=2, value_dim=3
    ),
    "LocalLinearAttention": lambda: LocalLinearAttention(DIM, 2),
    "LocalLinearAttention, grouped": lambda: LocalLinearAttention(
        DIM, 2, kv_heads=1, window=4, rotary_base=100.0
    ),
    "ParallaxAttention": lambda: ParallaxAttention(DIM, 2, rotary_base=100.0),
    "TitansMemory": lambda: TitansMemory(DIM, 2),
    "TitansMemory, chunks": lambda: TitansMemory(DIM, 2, chunk=3, momentum=False),
    "TitansMemory, deep": lambda: TitansMemory(DIM, 2, chunk=3, depth=2),
    "TitansMAG": lambda: TitansMAG(DIM, 2, window=4),
    "TitansMAL": lambda: TitansMAL(DIM, 2, window=4, persistent=1),
    "TitansMAC": lambda: TitansMAC(DIM, 2, segment=4),
    "TitansMAC, deep": lambda: TitansMAC(
        DIM, 2, segment=4, memory=TitansMemory(DIM, 2, chunk=4, depth=3, hidden=5, momentum=False)
    ),
    "RATAttention": lambda: RATAttention(DIM, 2, chunk=4),
    "RATAttention, no positions": lambda: RATAttention(DIM, 3, chunk=3, rotary_base=None),
    "HybridStack": lambda: HybridStack(
        DIM, [lambda: GatedDeltaNet(DIM, 2), lambda: CausalAttention(DIM, 2, window=3)], 3
    ),
    "kimi_linear_stack": lambda: kimi_linear_stack(DIM, 2, 4),
    "sparse_linear_stack": lambda: sparse_linear_stack(DIM, 2, 4, window=4),
}
NOT_CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "PerformerAttention": lambda: PerformerAttention(DIM, 2, causal=False),
    "CosFormerAttention": lambda: CosFormerAttention(DIM, 2, limit=32, causal=False),
    "CottentionLayer": lambda: CottentionLayer(DIM, 2, causal=False),
    "FastAttention": lambda: FastAttention(DIM, 2, causal=False),
    "SpectralAttention": lambda: SpectralAttention(DIM, 2),
    "FeedForwardKernelAttention": lambda: FeedForwardKernelAttention(DIM, 2),
    "AdvisorAttention": lambda: AdvisorAttention(DIM, 2, advisors=3),
}


def made(make: Callable[[], nn.Module], source: torch.Generator) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (), generator=source)))
    return make().double()


def tokens(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=source, dtype=torch.float64)


def tensors(state: object) -> list[Tensor]:
    layers = getattr(state, "layers", (state,))
    return [x for layer in layers for x in layer.tensors()]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [(7, 1, 12), (1,) * 9, (4, 8, 0, 3)])
def test_pieces_are_the_whole(name: str, sizes: tuple[int, ...], source: torch.Generator) -> None:
    layer = made(LAYERS[name], source)
    x = tokens(source, 2, sum(sizes))
    whole, last = layer(x, return_state=True)
    state, outputs = None, []
    for piece in x.split(list(sizes), dim=1):
        y, state = layer(piece, state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-9)
    for a, b in zip(tensors(state), tensors(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_is_each_sequence_alone(name: str, source: torch.Generator) -> None:
    """Also in two packed pieces, then decoded as a batch."""
    layer = made(LAYERS[name], source)
    first, second = (5, 1, 9), (2, 6, 4)
    rows = [tokens(source, 1, a + b + 2) for a, b in zip(first, second, strict=True)]
    state, outputs = None, [[], [], []]
    for begins, sizes in (((0, 0, 0), first), (first, second)):
        pieces = [
            row[:, begin : begin + size]
            for row, begin, size in zip(rows, begins, sizes, strict=True)
        ]
        cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        y, state = layer(torch.cat(pieces, 1), state, cu_seqlens=cu, return_state=True)
        for own, piece in zip(outputs, y.split(list(sizes), dim=1), strict=True):
            own.append(piece)
    for offset in (2, 1):
        last = torch.cat([row[:, row.shape[1] - offset, None] for row in rows])
        y, state = layer(last, state, return_state=True)
        for own, piece in zip(outputs, y.split(1), strict=True):
            own.append(piece)
    for row, own in zip(rows, outputs, strict=True):
        torch.testing.assert_close(torch.cat(own, 1), layer(row), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_later_tokens_change_nothing(name: str, source: torch.Generator) -> None:
    layer = made(LAYERS[name], source)
    x = tokens(source, 1, 11)
    changed = torch.cat([x[:, :6], tokens(source, 1, 5)], dim=1)
    torch.testing.assert_close(layer(x)[:, :6], layer(changed)[:, :6], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*LAYERS, *(f"{name}, all keys" for name in NOT_CAUSAL)])
def test_every_weight_gets_a_gradient(name: str, source: torch.Generator) -> None:
    make = NOT_CAUSAL[name.removesuffix(", all keys")] if "all keys" in name else LAYERS[name]
    layer = made(make, source)
    x = tokens(source, 2, 9)
    y = layer(x)
    assert y.shape == x.shape
    y.sin().sum().backward()
    for weight, parameter in layer.named_parameters():
        assert parameter.grad is not None, weight
        assert float(parameter.grad.abs().max()) > 0, weight


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_packed_without_causality(name: str, source: torch.Generator) -> None:
    layer = made(NOT_CAUSAL[name], source)
    rows = [tokens(source, 1, n) for n in (5, 1, 4)]
    cu = torch.tensor([0, 5, 6, 10], dtype=torch.int32)
    y = layer(torch.cat(rows, dim=1), cu_seqlens=cu)
    torch.testing.assert_close(y, torch.cat([layer(row) for row in rows], dim=1))
    pair = tokens(source, 2, 5)
    torch.testing.assert_close(layer(pair), torch.cat([layer(pair[:1]), layer(pair[1:])]))
    _, state = layer(pair, return_state=True)
    with pytest.raises(fv.errors.RuleError, match="causal"):
        layer(pair, state)


def test_a_convolution_looks_back_only_into_its_sequence(source: torch.Generator) -> None:
    layer = ShortConvolution(3, 4).double()
    x = torch.randn(1, 7, 3, generator=source, dtype=torch.float64)
    tail = torch.randn(1, 3, 3, generator=source, dtype=torch.float64)
    y, after = layer(x, tail)
    whole = torch.cat([tail, x], dim=1)
    for t in range(7):
        mixed = (whole[0, t : t + 4] * layer.filter[:, 0].T).sum(0)
        torch.testing.assert_close(y[0, t], mixed * mixed.sigmoid())
    torch.testing.assert_close(after, x[:, 4:])


def test_bounded_gates_keep_their_bound(source: torch.Generator) -> None:
    layer = KimiDeltaAttention(DIM, 2, least_log_decay=-5.0).double()
    log_decay = layer.log_decay(100 * tokens(source, 1, 50))
    assert float(log_decay.detach().min()) >= -5
    assert float(log_decay.detach().max()) <= 0


def test_full_layers_are_attention(source: torch.Generator) -> None:
    layer = made(lambda: CausalAttention(DIM, 3), source)
    x = tokens(source, 2, 8)
    q, k, v = (each(x).unflatten(-1, (3, 4)) for each in (layer.q, layer.k, layer.v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    weights = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    expected = layer.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(layer(x), expected)


def test_rotary_depends_on_distances_only(source: torch.Generator) -> None:
    from foveal.layers.causal import rotary

    q, k = (torch.randn(1, 1, 2, 7, generator=source, dtype=torch.float64) for _ in range(2))

    def product(i: int, j: int) -> Tensor:
        turned = (rotary(x, torch.tensor([[at]]), 50.0) for x, at in ((q, i), (k, j)))
        return torch.mul(*turned).sum(-1)

    torch.testing.assert_close(product(9, 4), product(25, 20))
    torch.testing.assert_close(product(3, 3), (q * k).sum(-1))


def test_rat_with_chunks_of_one_token_is_attention(source: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 9, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    gate = torch.rand(2, 9, 2, 4, generator=source, dtype=torch.float64)
    from foveal.layers.rat import rat

    expected = fv.attend(q, (1 - gate) * k, (1 - gate) * v, fv.Causal())
    torch.testing.assert_close(rat(q, k, v, gate, chunk=1), expected)


def test_a_stack_keeps_one_state_object(source: torch.Generator) -> None:
    stack = made(LAYERS["HybridStack"], source)
    x = tokens(source, 3, 6)
    _, state = stack(x, return_state=True)
    assert state.bytes == sum(t.numel() * t.element_size() for t in tensors(state))
    chosen = torch.tensor([2, 0, 2])
    next_token = tokens(source, 3, 1)
    expected = stack(torch.cat([x[chosen], next_token], dim=1))[:, -1:]
    got = stack(next_token, state.select(chosen).detach())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_proportions_of_stacks() -> None:
    kimi = [type(layer.mixer).__name__ for layer in kimi_linear_stack(DIM, 2, 8).layers]
    assert kimi == (["KimiDeltaAttention"] * 3 + ["LatentAttention"]) * 2
    sparse = [type(layer.mixer).__name__ for layer in sparse_linear_stack(DIM, 2, 5).layers]
    assert sparse == ["CausalAttention"] + ["LightningAttention"] * 3 + ["CausalAttention"]


def test_redrawn_features_change_the_layer(source: torch.Generator) -> None:
    layer = made(lambda: PerformerAttention(DIM, 2), source)
    x = tokens(source, 1, 5)
    before = layer(x)
    layer.redraw(source)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("name", LAYERS)
def test_low_precision_and_nothing(name: str, source: torch.Generator) -> None:
    layer = made(LAYERS[name], source).to(torch.bfloat16)
    x = tokens(source, 2, 9).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert bool(y.isfinite().all())
    assert layer(x[:, :0]).shape == (2, 0, DIM)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(fv.errors.ShapeError, match="heads"):
        LightningAttention(12, 5)
    with pytest.raises(fv.errors.ShapeError, match="value_heads"):
        GatedDeltaNet(12, 2, value_heads=3)
    with pytest.raises(fv.errors.ShapeError, match="kv_heads"):
        CausalAttention(12, 4, kv_heads=3)
    with pytest.raises(fv.errors.ShapeError, match="mixers"):
        HybridStack(12, [])
    with pytest.raises(fv.errors.PackingError, match="batch of 1"):
        LightningAttention(12, 2)(torch.zeros(2, 3, 12), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_that_do_not_fit_are_named(name: str, source: torch.Generator) -> None:
    layer, x = made(LAYERS[name], source), tokens(source, 2, 5)
    for given in (x[0], x[..., :5], x[None]):
        with pytest.raises(fv.errors.ShapeError, match=r"^x: "):
            layer(given)
    for other in (x.float(), x.bfloat16(), x.long(), [1.0], None):
        with pytest.raises(fv.errors.DtypeError, match=r"^x: "):
            layer(other)
    with pytest.raises(fv.errors.DeviceError, match=r"^x: got meta"):
        layer(x.to("meta"))
    for cuts in (torch.tensor([0]), torch.tensor([[0, 5]]), torch.tensor([0.0, 5.0])):
        with pytest.raises(fv.errors.PackingError, match="cu_seqlens"):
            layer(x[:1], cu_seqlens=cuts)
    for state in (3, x):
        with pytest.raises(fv.errors.OptionError, match=r"^state: "):
            layer(x, state)


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_goes_on(name: str, source: torch.Generator) -> None:
    layer, x = made(LAYERS[name], source), tokens(source, 0, 5)
    _, state = layer(x, return_state=True)
    assert layer(x[:, :1], state).shape == (0, 1, DIM)


def test_autocast_brings_tokens_to_the_weights() -> None:
    layer = LightningAttention(DIM, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(1, 3, DIM, dtype=torch.bfloat16)).shape == (1, 3, DIM)


def test_a_stack_needs_a_state_of_its_layers(source: torch.Generator) -> None:
    short, long = (
        made(lambda n=n: HybridStack(DIM, [lambda: GatedDeltaNet(DIM, 2)], n), source)
        for n in (1, 2)
    )
    x = tokens(source, 2, 4)
    for stack, other in ((short, long), (long, short)):
        with pytest.raises(fv.errors.ShapeError, match=r"state: got one of \d layers"):
            stack(x, other(x, return_state=True)[1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TransNormerLLMBlock(DIM, 2, layer=2, layers=2), "layer: got 2; one of 2 layers"),
        (lambda: TransNormerLLMBlock(DIM, 2, layers=0), "layer: got 0; one of 0 layers"),
        (lambda: KimiDeltaAttention(DIM, 2, least_log_decay=1.0), "least_log_decay: got 1.0"),
        (lambda: KimiDeltaAttention(DIM, 2, conv=0), "conv: got 0"),
        (lambda: GatedDeltaNet(DIM, 2, largest_write=-1.0), "largest_write: got -1.0"),
        (lambda: TitansMemory(DIM, 2, largest_write=-1.0), "largest_write: got -1.0"),
        (lambda: TitansMemory(DIM, 2, depth=2, hidden=0), "hidden: got 0"),
        (lambda: TitansMAG(DIM, 2, memory=3), "memory: got a int"),
        (lambda: TitansMAC(DIM, 2, memory=TitansMemory(8, 2)), "memory: got one of dim 8"),
        (lambda: MLSTMLayer(DIM, 2, rule=fv.Delta()), "rule: got Delta()"),
        (lambda: LightningAttention(DIM, 2, log_decay=[0.0, 0.0]), "log_decay: got a list"),
        (lambda: HybridStack(DIM, [GatedDeltaNet(DIM, 2)]), "mixers: got a layer"),
        (
            lambda: RATAttention(DIM, 2, rotary_base=0.0)(torch.zeros(1, 2, DIM)),
            "rotary_base: got 0.0",
        ),
    ],
)
def test_options_that_cannot_work_are_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(fv.errors.FovealError) as raised:
        make()
    assert said in str(raised.value)
