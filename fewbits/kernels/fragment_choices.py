"""The choices of `few` and `many` (fragments.py): how the work is divided, and what memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fewbits.kernels import nvrtc
from fewbits.kernels.fragment_layout import Layout

_LEAST_UNITS = 4  # of a block of `many`: with fewer, adding up takes longer than it saves
SHARED_LIMIT = 227 << 10  # bytes a thread block can have on Hopper
_MANY_STATIC = 1 << 10  # of these, what `many` has beside what `shared` counts: barriers, and what alignment takes


@dataclass(frozen=True, kw_only=True)
class Few:
    """`few`: rt tiles of 16 rows a strip, warps of a block, mt tiles of 8 tokens, split blocks of a cluster along the
    columns, ring units of weights on their way to each warp (staged in shared memory, else in registers), per_sm blocks
    a multiprocessor, registers for `resident`.

    With more resident than per_sm the blocks of the next product stand ready, with their first weights, while this one
    runs.
    """

    rt: int = 1
    warps: int = 16
    mt: int = 1
    split: int = 1
    ring: int = 2
    per_sm: int = 1
    resident: int = 1
    staged: bool = False

    name = "few"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def tokens(self) -> int:
        return 8 * self.mt

    def places(self, n: int, sms: int) -> int:
        """Clusters that share out the strips."""
        return min(-(-n // (16 * self.rt)), max(1, sms * self.per_sm // self.split))

    def shared(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        rows = 16 * self.rt
        strips = -(-n // rows)
        most = -(-strips // self.places(n, sms))
        parts = most + self.warps
        width = -(-layout.units(k) // self.split) * layout.unit
        tokens = (m if self.mt == 1 else self.tokens) * (2 * width + 16)
        sums = 4 * width // layout.grain * self.tokens if layout.grain else 0
        slot = self.rt * (2 * layout.unit * layout.bits + layout.groups * (48 if layout.zero else 32))
        ring = self.warps * self.ring * slot if self.staged else 0
        sums_of_parts = 4 * parts * self.tokens * (rows + 4)
        per_strip = 4 * (most * rows + -(-most // 4) * 4)  # alpha, and which warps have parts
        return layout.table_bytes + ring + per_strip + sums_of_parts + sums + tokens

    def grid(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        return self.places(n, sms) * self.split

    @property
    def macros(self) -> dict[str, int]:
        return {
            "RT": self.rt, "WARPS": self.warps, "MT": self.mt, "SPLIT": self.split, "RING": self.ring,
            "RESIDENT": self.resident, "STAGED": int(self.staged),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Many:
    """`many`: wg warpgroups of 64 rows, nt tokens, stages of a unit on their way, per_sm blocks a multiprocessor.

    share: tiles that are left over are not shared (0), each by the same number of blocks (1), all by all (2).
    split: or the columns of every tile are, by so many blocks of a cluster, if all tiles can be worked on at once.
    apart: the sums of a group are kept apart; else a level times its scale is rounded, to 16 bits, with E4M3 tokens to
    E4M3.
    warpwise: warps multiply for themselves, not in fours: a little more to do, and nothing to wait for.
    """

    wg: int = 2
    nt: int = 64
    stages: int = 4
    per_sm: int = 1
    share: int = 2
    apart: bool = False
    split: int = 1
    warpwise: bool = False

    name = "many"

    @property
    def rows(self) -> int:
        return 64 * self.wg

    @property
    def threads(self) -> int:
        return 128 * self.wg + 128

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, where those of the warps that only wait are handed over; else 0."""
        each = 65536 // self.per_sm // (128 * (self.wg + 1))
        if self.nt * self.wg < 256 and not (self.apart and self.nt + 68 > each):
            return 0
        each = each // 8 * 8
        return min(240, (each * (self.wg + 1) - 40) // self.wg // 8 * 8)

    @property
    def tokens(self) -> int:
        return self.nt

    def ring(self, layout: Layout) -> int:
        """Bytes of weights and tokens on their way."""
        zeros = layout.zero and not (layout.e4m3 and self.apart)
        of_group = 3 if zeros else 2  # bytes a row: a scale, and a zero point
        weights = self.rows * (layout.unit * layout.bits // 8 + layout.groups * of_group)
        weights = -(-weights // 128) * 128
        return self.stages * (self.nt * (1 if layout.e4m3 else 2) * layout.unit + weights)

    def shared(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        turned = 32 * self.rows * (1 if self.nt // 16 % 2 else 2)
        return 1024 + layout.table_bytes + self.ring(layout) + turned

    def grid(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        tiles = self.tiles(n, m)
        if self.split > 1:
            return tiles * self.split
        runs = -(-tiles * layout.units(k) // _LEAST_UNITS) if self.share else tiles
        return min(self.per_sm * sms, runs, nvrtc.COUNTERS)

    def tiles(self, n: int, m: int) -> int:
        return -(-n // self.rows) * -(-m // self.nt)

    def workspace(self, layout: Layout, n: int, k: int, m: int, sms: int) -> int:
        """Sums that blocks leave for one another: two tiles each, where tiles are shared."""
        blocks = self.grid(layout, n, k, m, sms)
        shared = self.split == 1 and self.share and self.tiles(n, m) % blocks
        return 2 * blocks * self.rows * self.nt if shared else 0

    @property
    def macros(self) -> dict[str, int]:
        return {
            "WG": self.wg, "NT": self.nt, "STAGES": self.stages, "RT": 1, "REGISTERS": self.registers,
            "RESIDENT": self.per_sm, "SHARE": self.share, "LEAST_UNITS": _LEAST_UNITS, "APART": int(self.apart),
            "SPLIT": self.split, "WARPWISE": int(self.warpwise),
        }  # fmt: skip


Config = Few | Many


@lru_cache(maxsize=4096)  # asked at every product
def sizes(config: Config, layout: Layout, n: int, k: int, m: int, sms: int) -> tuple[int, int, int]:
    """Of a launch: blocks, bytes of shared memory, and float32 numbers that blocks leave for one another."""
    given = layout, n, k, m, sms
    left = config.workspace(*given) if isinstance(config, Many) else 0
    return config.grid(*given), config.shared(*given), left


def runs_on(config: Config, capability: int) -> bool:
    """Whether GPUs of this major compute capability have the instructions: wgmma is Hopper's alone, clusters stayed."""
    if isinstance(config, Many):
        return capability == 9
    return capability >= 9 or config.split == 1


def dense_takes(layout: Layout, n: int) -> bool:
    """Whether a dense product takes n rows; in E4M3 cuBLASLt wants whole blocks of 16."""
    return not layout.e4m3 or n % 16 == 0


def fits(config: Config, layout: Layout, n: int, k: int, m: int, sms: int, limit: int = SHARED_LIMIT) -> bool:
    """Whether the configuration takes m tokens, and its blocks no more than `limit` bytes of shared memory."""
    if config.split > layout.units(k) or (isinstance(config, Few) and (layout.e4m3 or m > config.tokens)):
        return False
    if isinstance(config, Many):
        if config.warpwise and layout.e4m3:
            return False
        if config.apart and not layout.e4m3 and (not layout.group or layout.group % (16 if config.warpwise else 64)):
            return False
        blocks = config.grid(layout, n, k, m, sms)
        if config.split > 1 and blocks > config.per_sm * sms:
            return False
        if config.split > 1 and 4 * config.rows * config.nt > config.ring(layout):
            return False  # where blocks leave sums for one another
        if layout.units(k) * blocks**2 >= 1 << 31:
            return False
    static = _MANY_STATIC if isinstance(config, Many) else 0
    return static + config.shared(layout, n, k, m, sms) <= limit
