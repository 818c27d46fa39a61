"""Weights in the tensor cores' order: codes come back, each thread finds its own, choices are found."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from fewbits.core.errors import BadInput
from fewbits.formats import parse_format
from fewbits.kernels import cuda_tokens, fragment_layout, fragments, nvrtc, tuned, tuning
from fewbits.kernels.base import No
from fewbits.kernels.cuda_fragments import layout_of
from fewbits.kernels.fragment_choices import Few, Many, fits, runs_on
from fewbits.kernels.fragment_layout import Layout


def layout(bits: int, table: bool = False, group: int = 128, zero: bool = False) -> Layout:
    return Layout(bits=bits, table=table, group=group, zero=zero, offset=1 << (bits - 1), half=False)


@pytest.mark.parametrize(
    ("bits", "table"), [(2, False), (3, False), (4, False), (8, False), (2, True), (3, True), (4, True)]
)
@pytest.mark.parametrize("shape", [(16, 64), (100, 300), (64, 128), (1, 8)])
def test_packing_is_undone(bits: int, table: bool, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    words = fragment_layout.pack(codes, layout(bits, table))
    assert words.dtype == torch.int32 and words.is_contiguous()
    padded = -(-shape[0] // fragment_layout.ROWS) * fragment_layout.ROWS * -(-shape[1] // 128) * 128
    assert words.numel() * 32 == padded * bits  # not a bit more
    assert torch.equal(fragment_layout.unpack(words, *shape, layout(bits, table)), codes)


def test_a_thread_holds_what_the_matrix_instruction_wants() -> None:
    """PTX ISA, fragments of mma.m16n8k16: by the formula, value by value."""
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    words = fragment_layout.pack(codes, layout(4)).long()
    for tile, block, lane, step in [(0, 0, 0, 0), (1, 1, 5, 2), (3, 0, 31, 3), (2, 1, 18, 1)]:
        word, g, c = int(words[tile, block // 2, block % 2 * 128 + 4 * lane + step]), lane // 4, lane % 4
        for r in range(4):
            for i in range(2):
                row, column = 16 * tile + g + 8 * (r % 2), 64 * block + 16 * step + 2 * c + 8 * (r // 2) + i
                assert word >> (4 * r + 16 * i) & 15 == codes[row, column]


def test_less_than_four_bits_lie_where_the_kernel_looks() -> None:
    """Registers of rows g and g + 8 have the same place within what a shift brings; 3 bits: the last one's bits are
    those that five codes leave of three words (cuda/fragments.cu, `place`)."""
    places = {
        2: [[(0, n) for n in range(8)], [(1, n) for n in range(8)]],
        3: [
            [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (2, 3), (0, 2), (0, 3)],
            [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (0, 4), None],
        ],
    }
    for bits, of_rows in places.items():
        codes = torch.randint(0, 1 << bits, (64, 128), dtype=torch.uint8)
        words = fragment_layout.pack(codes, layout(bits)).long() & 0xFFFFFFFF
        lanes = [(0, 0, 0), (1, 1, 5), (3, 0, 31), (2, 1, 18)]
        for (tile, block, lane), low, pair, i in itertools.product(lanes, range(2), range(8), range(2)):
            mine = words[tile, 0, 4 * lane : 4 * lane + 4]
            if bits == 3:
                mine = torch.cat((mine, words[tile, 0, 128 + 2 * lane : 130 + 2 * lane]))
            mine, place = mine[bits * block :][:bits], of_rows[low][pair]
            if place is None:
                found = sum((int(word) >> 15 + 16 * i & 1) << j for j, word in enumerate(mine))
            else:
                found = int(mine[place[0]]) >> bits * place[1] + 16 * i & (1 << bits) - 1
            row, column = 16 * tile + lane // 4 + 8 * low, 64 * block + 8 * pair + 2 * (lane % 4) + i
            assert found == codes[row, column], (bits, tile, block, lane, low, pair, i)


@pytest.mark.parametrize(("dtype", "least", "last"), [(torch.bfloat16, -133, 255), (torch.float16, -24, 2047)])
def test_a_bare_code_is_a_number(dtype: torch.dtype, least: int, last: int) -> None:
    """Subnormal numbers and the first binade after them are evenly spaced: what the kernels multiply codes as."""
    codes = torch.arange(last + 1, dtype=torch.int16)
    assert torch.equal(codes.view(dtype).double(), codes.double() * 2.0**least)
    assert torch.tensor([last + 2], dtype=torch.int16).view(dtype).double() != (last + 2) * 2.0**least


def test_scales_keep_their_digits() -> None:
    scale = (torch.rand(70, 5) * torch.logspace(-12, 3, 70)[:, None]).half().float()
    packed, alpha = fragment_layout.pack_scales(scale, 5 * 128, layout(4))
    tiles, groups, _, _ = packed.shape
    rows = packed.permute(0, 3, 2, 1).reshape(16 * tiles, groups)[:70, :5].float() * alpha[:, None]
    assert torch.equal(rows, scale.half().float())
    assert torch.equal(alpha, torch.exp2(torch.log2(alpha).round()))  # powers of two


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("int4-g128", True), ("int4-asym-g64", True), ("int2-g64", True), ("int3-asym-g32", True),
        ("int8-channel", True), ("nf4-g64", True), ("fp4_e2m1-g16", True), ("int4-tensor", True),
        ("int4-asym-channel", True), ("int4-g96", True),
        ("int5-g64", False), ("fp8_e4m3-channel", False), ("int4-g72", False), ("q4_k", False),
    ],
)  # fmt: skip
def test_which_formats_have_an_order(name: str, taken: bool) -> None:
    found = layout_of(parse_format(name), 1024, False)
    assert isinstance(found, Layout) == taken
    if isinstance(found, No):
        assert found.reason


def test_choices_come_from_the_nearest_measured_product(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    near = {"bits": 4, "table": False, "group": 128, "n": 4096, "k": 4096}
    record = {
        "version": tuned.VERSION, "device": "Some GPU 9", "capability": 9,
        "cases": [
            {**near, "m": 1, "kernel": "few", "choices": {"warps": 8}},
            {**near, "m": 64, "kernel": "many", "choices": {"nt": 64, "stages": 3}},
            {**near, "m": 4096, "kernel": "dense", "choices": {}},
        ],
    }  # fmt: skip
    path = nvrtc.folder() / "tuned" / tuned.file_name("Some GPU 9")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    tuned.forget()
    shape = (4096, 5120)
    assert tuned.choice("Some GPU 9", 9, layout(4), *shape, 1, 132) == Few(warps=8)
    assert tuned.choice("Some GPU 9", 9, layout(3), *shape, 2, 132) == Few(warps=8)
    assert tuned.choice("Some GPU 9", 9, layout(4), *shape, 48, 132) == Many(nt=64, stages=3)
    assert tuned.choice("Some GPU 9", 9, layout(4), *shape, 10000, 132) is None
    rounded = dataclasses.replace(layout(4), e4m3=True)  # cases of inputs in 16 bits say nothing of E4M3 ones
    assert tuned.choice("Some GPU 9", 9, rounded, *shape, 1, 132) == Many(nt=16, stages=6, share=1, apart=True)
    case = {**near, "e4m3": True, "m": 64, "kernel": "many", "choices": {"nt": 64, "wg": 3, "apart": True}}
    path.write_text(json.dumps({**record, "cases": [*record["cases"], case]}))
    tuned.forget()
    assert tuned.choice("Some GPU 9", 9, rounded, *shape, 1, 132) == Many(nt=64, wg=3, apart=True)
    assert tuned.choice("Some GPU 9", 9, layout(4), *shape, 48, 132) == Many(nt=64, stages=3)
    tuned.forget()


def test_between_two_measured_products_the_choice_is_that_for_more_tokens(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))  # or what was tuned here would go first
    tuned.forget()
    for m, more in ((3, 4), (17, 32), (33, 64), (65, 128), (200, 256), (600, 1024)):
        chosen = tuned.choice("NVIDIA H200", 9, layout(4), 4096, 4096, m, 132)
        assert chosen == tuned.choice("NVIDIA H200", 9, layout(4), 4096, 4096, more, 132), m


SHAPES = ((64, 128), (576, 576), (28672, 4096), (4096, 14336), (8192, 28672))
TOKENS = (1, 3, 8, 9, 16, 17, 64, 200, 256, 300)


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_without_measurements_rules_of_thumb_fit(capability: int) -> None:
    for m in TOKENS:
        for n, k in SHAPES:
            config = tuned.rule(capability, layout(4), n, k, m, 108)
            if config is None:
                assert m > 256 or (capability != 9 and (m > 8 or k > 8192))
                continue
            assert fits(config, layout(4), n, k, m, 108) and runs_on(config, capability)
            assert capability == 9 or isinstance(config, Few)  # wgmma
            assert capability >= 9 or config.split == 1  # clusters


@pytest.mark.parametrize("group", [32, 96, 128, 256])
def test_rules_of_thumb_for_e4m3_tokens_fit(group: int) -> None:
    rounded = dataclasses.replace(layout(4), group=group, e4m3=True)
    for m in TOKENS:
        for n, k in SHAPES:
            found = tuned.rule(9, rounded, n, k, m, 108)
            assert isinstance(found, Many) and fits(found, rounded, n, k, m, 108)


def test_many_e4m3_tokens_take_a_dense_product_of_whole_blocks_of_rows() -> None:
    rounded = dataclasses.replace(layout(4), group=128, e4m3=True)
    assert tuned.rule(9, rounded, 4096, 4096, 4096, 132) is None
    assert isinstance(tuned.rule(9, rounded, 4104, 4096, 4096, 132), Many)  # cuBLASLt wants 16 rows
    for n, taken in ((4096, type(None)), (4104, Many)):
        assert isinstance(tuned.choice("NVIDIA H200", 9, rounded, n, 4096, 4096, 132), taken)


@pytest.mark.parametrize(("bits", "group", "zero"), [(4, 128, False), (3, 64, True), (8, 0, False)])
def test_tensor_copies_are_told_of_rows_of_tiles(bits: int, group: int, zero: bool, monkeypatch) -> None:
    of = dataclasses.replace(layout(bits), group=group, zero=zero)
    weight = tuning.random_weight(of, 200, 500, torch.device("cpu"))
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(nvrtc, "tensor_map_at", lambda *given: told.append(given))
    x, config = torch.ones(40, 504, dtype=torch.bfloat16), Many(nt=48, wg=2)
    fragments._maps(x, weight, of, config)
    zeros, scales = weight.words if weight.zero is None else weight.zero, weight.scale if group else weight.words
    expected: set[tuple[object, ...]] = {(x.data_ptr(), torch.bfloat16, 40, 504)}
    for part, dtype in ((weight.words, torch.int64), (scales, torch.int32), (zeros, torch.int32)):
        rows = part.view(weight.words.shape[0], -1).view(dtype)
        expected.add((rows.data_ptr(), dtype, *rows.shape))
    assert {given[:4] for given in told} == expected
    assert {given[4] for given in told} >= {(48, 64), (8, 32 * bits)}


def test_levels_times_scales_are_rounded_for_many_tokens_only() -> None:
    for m in (1, 16, 64):
        assert all(isinstance(config, Many) and config.apart for config in tuning.candidates(m, e4m3=True))
    some = tuning.candidates(256, e4m3=True)
    assert {config.apart for config in some if isinstance(config, Many)} == {True, False}


@pytest.mark.parametrize("part", [0, 32, 128])
@pytest.mark.parametrize("columns", [8, 100, 4096, 14336, 28672])
def test_threads_take_all_columns_of_a_token(columns: int, part: int) -> None:
    threads, chunks = cuda_tokens.shape(columns, part)
    assert threads % 32 == 0 and threads <= 512
    assert columns <= threads * chunks * (16 if part else 8) < columns + 32 * chunks * (16 if part else 8)
    assert not cuda_tokens.takes(torch.ones(2, columns), torch.int8, "none", None)


def test_every_choice_says_all_macros() -> None:
    of_all = ["BITS", "TABLE", "GROUP", "UNIT", "ZERO", "OFFSET", "HALF", "E4M3", "RT"]
    own = {
        Few(): ["WARPS", "MT", "SPLIT", "RING", "RESIDENT", "STAGED"],
        Many(): ["WG", "NT", "STAGES", "SHARE", "LEAST_UNITS", "SPLIT", "APART", "RESIDENT", "REGISTERS", "WARPWISE"],
        None: [],
    }
    for config, names in own.items():
        text = fragments.source(layout(4, zero=True), config)
        head = text[: text.index("// Types and instructions")]
        assert sorted(line.split()[1] for line in head.splitlines()) == sorted(of_all + names)
        assert "@WGMMA@" not in text or isinstance(config, Few)


FORMATS = ("int4-g128", "int4-g64", "int4-asym-g128", "int4-asym-channel", "mxfp4", "nf4-g32", "lloyd3-channel")


@pytest.mark.parametrize("name", FORMATS)
def test_measured_choices_leave_room_for_barriers(name: str, tmp_path, monkeypatch) -> None:
    """Static shared memory counts too: 1 KB of `many`, of the 227 that a block can have."""
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    tuned.forget()
    many = 0
    for n, k in SHAPES:
        found = layout_of(parse_format(name), k, False)
        assert isinstance(found, Layout)
        for m in (1, 16, 64, 256, 300, 512, 1024, 4096):
            config = tuned.choice("NVIDIA H200", 9, found, n, k, m, 132)
            if isinstance(config, Many):
                assert config.shared(found, n, k, m, 132) + 1024 <= 227 << 10
                many += 1
    assert many > 10
    tuned.forget()


def test_sums_that_blocks_leave_for_one_another_lie_where_weights_were() -> None:
    assert not fits(Many(nt=128, wg=4, stages=2, split=2), layout(4), 4096, 4096, 64, 132)
    assert fits(Many(nt=128, wg=2, stages=4, split=2), layout(4), 4096, 4096, 64, 132)


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 3, "cases"', "[]", '{"version": 3, "capability": 9}',
        '{"version": 3, "capability": 9, "cases": [{"bits": 4}]}',
        '{"version": 3, "capability": 9, "cases": [{"bits": 4, "table": false, "group": 128, "n": 1, "k": 1, "m": 1, '
        '"kernel": "fwe", "choices": {}}]}',
        '{"version": 3, "capability": 9, "cases": [{"bits": 4, "table": false, "group": 128, "n": 1, "k": 1, "m": 1, '
        '"kernel": "few", "choices": {"wraps": 2}}]}',
    ],
)  # fmt: skip
def test_a_file_of_choices_that_cannot_be_read_is_named(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    path = nvrtc.folder() / "tuned" / tuned.file_name("Some GPU 9")
    path.parent.mkdir(parents=True)
    path.write_text(text.replace('"version": 3', f'"version": {tuned.VERSION}'))
    tuned.forget()
    with pytest.raises(BadInput, match=r"some-gpu-9.json .*--tune"):
        tuned.choice("Some GPU 9", 9, layout(4), 64, 64, 1, 132)
    of_one = {
        "bits": 4,
        "table": False,
        "group": 128,
        "n": 64,
        "k": 64,
        "m": 1,
        "kernel": "few",
        "choices": {"warps": 4},
    }
    assert tuned.keep("Some GPU 9", 9, {}, [of_one]) == path  # the way out that is named
    assert tuned.choice("Some GPU 9", 9, layout(4), 64, 64, 1, 132) == Few(warps=4)
    tuned.forget()


def test_the_fastest_of_several_measurements_wins(monkeypatch) -> None:
    """A choice that was lucky once must not win against one that is fast each time; the slowest are not timed again."""
    seen: list[int] = []
    lucky = iter([1.0, 9.0, 9.0, 9.0])

    def microseconds(calls: list[int]) -> float:
        seen.append(calls[0])
        return next(lucky) if calls[0] == 3 else 2.0 + calls[0]

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    assert tuning._fastest([[i] for i in range(12)]) == (0, 2.0)
    assert seen.count(11) == 1 and seen.count(3) == 4
    lucky = iter([9.0] * 4)
    assert tuning._fastest([[i / 50] for i in range(12)], [0]) == (1, 2.02), "who rounds more, for a hundredth"
    assert tuning._fastest([[i] for i in range(2)], [0]) == (0, 2.0)


def test_a_cluster_has_a_tile_of_its_own_at_once() -> None:
    """Columns split over clusters: every tile is on the device, and nothing is left in memory for others."""
    config = Many(nt=64, wg=1, stages=8, split=2)
    assert fits(config, layout(4), 4096, 4096, 64, 132)
    assert config.grid(layout(4), 4096, 4096, 64, 132) == 2 * 64
    assert config.workspace(layout(4), 4096, 4096, 64, 132) == 0
    assert not fits(config, layout(4), 6144, 4096, 64, 132)  # 2 x 96 blocks for 132 multiprocessors
    assert not fits(config, layout(4), 64, 128, 64, 132)  # one unit of columns for two blocks


def test_staged_units_leave_the_registers_to_the_next_product() -> None:
    kept, staged = Few(ring=4), Few(ring=4, staged=True)
    shape = layout(4), 4096, 4096, 1, 132
    unit = 16 * 128 // 2 + 16 * 2  # bytes: codes, and a float16 scale a row
    assert staged.shared(*shape) - kept.shared(*shape) == 16 * 4 * unit


def test_tuning_one_format_leaves_the_others_what_they_had(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    tuned.forget()
    shape = 4096, 4096
    before = tuned.choice("NVIDIA H200", 9, layout(3, group=64), *shape, 1, 132)  # shipped
    product = {"bits": 4, "table": False, "group": 128, "n": 4096, "k": 4096, "m": 1}
    rounded = dataclasses.replace(layout(4), e4m3=True)
    for warps in (8, 4):  # the second time it is there already
        rows = [{**product, "kernel": "few", "choices": {"warps": warps}}]
        rows += [{**product, "kernel": "many", "choices": {"nt": 16, "apart": True}, "e4m3": True}]
        path = tuned.keep("NVIDIA H200", 9, {"date": "today"}, rows)
        assert path.is_relative_to(tmp_path)
        assert tuned.choice("NVIDIA H200", 9, layout(4), *shape, 1, 132) == Few(warps=warps)
        assert tuned.choice("NVIDIA H200", 9, rounded, *shape, 1, 132) == Many(nt=16, apart=True)
        assert tuned.choice("NVIDIA H200", 9, layout(3, group=64), *shape, 1, 132) == before
    tuned.keep("Another GPU", 9, {}, rows)  # of which nothing was known
    assert len(tuned.cases("Another GPU", 9)) == 2
    tuned.forget()
