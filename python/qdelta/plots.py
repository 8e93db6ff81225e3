"""Results as figures; needs matplotlib, the extra `plot`.

Those of `qdelta bench` with the panels that they can fill: rates against depth, parts of the
ceiling, both programs of a comparison, profiles; plain rates where nothing else shows them. Those
of `qdelta eval`: KL divergence against bits per weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .bench import Row
from .errors import ArgumentError, Error, FileAccessError
from .profiling import PARTS
from .report import label, threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .quality import Quality

# Okabe and Ito's palette, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, BLACK, GREY = "#56B4E9", "#D55E00", "#F0E442", "#000000", "#BBBBBB"
LINES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, BLACK)
MARKERS = "osD^vPX"
PART_COLOURS = dict(
    zip(PARTS, (BLUE, ORANGE, GREEN, SKY, PINK, VERMILION, YELLOW, BLACK, GREY), strict=True)
)
SUFFIXES = (".svg", ".png")


class Panel(NamedTuple):
    """A part of the figure: its height in inches and what draws it."""

    height: float
    draw: Callable[[Axes], None]


def check(path: str | Path) -> None:
    """Raise what `plot` would raise for this name, before there are results to lose."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileAccessError(f"{path.parent}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise Error("plots need matplotlib: pip install 'qdelta[plot]'")


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Draw results into a file, SVG or PNG by its name.

    rows: at least one. Raises what `check` raises, and FileAccessError.
    """
    _draw(_panels(rows), _footer(rows), path)


def plot_quality(rows: Sequence[Quality], path: str | Path) -> None:
    """Draw KL divergence against bits per weight; the rest as `plot`."""
    footer = [f"against {row.against} ({row.against_quant}), {row.scored} tokens" for row in rows]
    footer += [f"no difference: {_quality_label(row)}" for row in rows if row.mean_kl <= 0]
    _draw([_quality_panel(rows)], "\n".join(dict.fromkeys(footer)), path)


def _draw(panels: Sequence[Panel], footer: str, path: str | Path) -> None:
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    # Same results, same bytes: no random ids, and no date but that of the results.
    with matplotlib.rc_context({"svg.hashsalt": "qdelta", "font.size": 9}):
        heights = [panel.height for panel in panels]
        figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            panel.draw(ax)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color="#555555")
        try:
            dates = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=150, metadata=dates)
        except OSError as error:
            raise FileAccessError(error.errno, error.strerror, str(path)) from error


def _footer(rows: Sequence[Row]) -> str:
    """Machine, version and day of the results."""
    machines = dict.fromkeys(f"{row.cpu_info}, {row.isa}" for row in rows)
    versions = dict.fromkeys(f"qdelta {row.build_commit}" for row in rows)
    days = sorted({row.test_time[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return "\n".join([*machines, f"{', '.join(versions)}, {when}"])


def _panels(rows: Sequence[Row]) -> list[Panel]:
    panels = []
    prompts, gens = [r for r in rows if r.n_prompt], [r for r in rows if r.n_gen]
    for title, kind in (("Reading a prompt", prompts), ("Decoding", gens)):
        lines = _by_depth(kind)
        if lines:
            panels.append(_depth_panel(f"{title} after other tokens", lines))
        if compared := [row for row in kind if row.against]:
            panels.append(_against_panel(f"{title}: two programs, measured in turn", compared))
        if not lines and not compared and kind:
            panels.append(_rate_panel(title, kind))
    if measured := [row for row in rows if row.of_ceiling is not None]:
        panels.append(_ceiling_panel(measured))
    if profiled := [row for row in rows if row.profile]:
        panels.append(_profile_panel(profiled))
    return panels


def _by_depth(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that differ in depth only, by a label; of at least two depths, ascending."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_label(row, depth=False), []).append(row)
    return {
        name: sorted(line, key=lambda row: row.n_depth)
        for name, line in lines.items()
        if len({row.n_depth for row in line}) > 1
    }


def _label(row: Row, *, depth: bool = True) -> str:
    """What a row measured: model, test, threads."""
    model = row.model_type.removeprefix("qwen35 ")
    test = row.test if depth else row.test.partition(" @ ")[0]
    usual = "f32" if row.quant == "none" else "f16"
    kv = "" if row.type_k == usual else f", {row.type_k} cache"
    return f"{model}, {test}, {threads(row)}{kv}"


def _depth_panel(title: str, lines: dict[str, list[Row]]) -> Panel:
    def draw(ax: Axes) -> None:
        for i, (name, line) in enumerate(lines.items()):
            ax.errorbar(
                [row.n_depth for row in line],
                [row.avg_ts for row in line],
                [row.stddev_ts for row in line],
                label=name,
                color=LINES[i % len(LINES)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if i < len(LINES) else "--",
                capsize=3,
            )
        ax.set_title(title, loc="left")
        ax.set_xlabel("tokens before")
        ax.set_ylabel("tokens per second")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", " "))
        ax.grid(alpha=0.3)
        _legend(ax)

    return Panel(2.8, draw)


def _legend(ax: Axes) -> None:
    """A legend beside the axes, where it hides nothing."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _bars(ax: Axes, names: Sequence[str], *, bars: int = 1) -> list[list[float]]:
    """Prepare an axis of horizontal bars; places of the bars, one list a series."""
    height = 0.8 / bars
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    return [[i + (bar - (bars - 1) / 2) * height for i in range(len(names))] for bar in range(bars)]


def _bars_height(rows: int, bars: int = 1) -> float:
    return 0.9 + rows * (0.1 + 0.17 * bars)


def _rate_panel(title: str, rows: Sequence[Row]) -> Panel:
    def draw(ax: Axes) -> None:
        (places,) = _bars(ax, [_label(row) for row in rows])
        spread = [row.stddev_ts for row in rows]
        rates = [row.avg_ts for row in rows]
        ax.barh(places, rates, 0.7, xerr=spread, color=SKY, capsize=3)
        ax.set_title(title, loc="left")
        ax.set_xlabel("tokens per second")
        ax.set_xlim(left=0)

    return Panel(_bars_height(len(rows)), draw)


def _against_panel(title: str, rows: Sequence[Row]) -> Panel:
    pairs = [(row, row.against) for row in rows if row.against]

    def draw(ax: Axes) -> None:
        ours, theirs = _bars(ax, [_label(row) for row in rows], bars=2)
        values = (
            ("qdelta", ours, BLUE, [(row.avg_ts, row.stddev_ts) for row, _ in pairs]),
            (_programs(rows), theirs, ORANGE, [(x.avg_ts, x.stddev_ts) for _, x in pairs]),
        )
        for name, places, colour, rates in values:
            means, spread = zip(*rates, strict=True)
            ax.barh(places, means, 0.36, xerr=spread, color=colour, capsize=2, label=name)
        ends = [max(x.avg_ts + x.stddev_ts for x in pair) for pair in pairs]
        for i, (end, (_, other)) in enumerate(zip(ends, pairs, strict=True)):
            spread_text = f"{other.ratio_min:.2f} to {other.ratio_max:.2f}"
            text = f"{other.ratio:.2f}× ({spread_text}) {other.model_type}"
            ax.annotate(text, (end, i), (6, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_title(title, loc="left")
        ax.set_xlabel("tokens per second (ratio: median over pairs, least to most)")
        # Room for the text behind the longest bar.
        ax.set_xlim(0, 1.9 * max(ends))
        _legend(ax)

    return Panel(_bars_height(len(rows), 2) + 0.3, draw)


def _programs(rows: Iterable[Row]) -> str:
    """Names of the other programs, without their folders."""
    return ", ".join(dict.fromkeys(Path(row.against.program).name for row in rows if row.against))


def _ceiling_panel(rows: Sequence[Row]) -> Panel:
    def draw(ax: Axes) -> None:
        (places,) = _bars(ax, [_label(row) for row in rows])
        parts = [row.of_ceiling or 0.0 for row in rows]
        colours = [BLUE if row.n_prompt else ORANGE for row in rows]
        bars = ax.barh(places, parts, 0.7, color=colours)
        ax.bar_label(bars, [f"{part:.2f}" for part in parts], padding=4, fontsize=8)
        ax.axvline(1, color="#555555", linewidth=1)
        ax.set_title("Part of what the machine could do", loc="left")
        ax.set_xlabel("rate over ceiling: arithmetic for prompts, memory for decoding")
        ax.set_xlim(0, max(1.1, *parts) + 0.1)

    return Panel(_bars_height(len(rows)), draw)


def _profile_panel(rows: Sequence[Row]) -> Panel:
    def draw(ax: Axes) -> None:
        (places,) = _bars(ax, [_label(row) for row in rows])
        left = [0.0] * len(rows)
        for name in PARTS:
            shares = [100 * row.profile[name].share if row.profile else 0.0 for row in rows]
            bars = ax.barh(places, shares, 0.7, left, color=PART_COLOURS[name], label=label(name))
            for bar in bars:
                bar.set_edgecolor("white")
                bar.set_linewidth(0.4)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        ax.set_title("Where the time goes", loc="left")
        ax.set_xlabel("% of the time of a stream")
        ax.set_xlim(0, 100)
        _legend(ax)

    return Panel(max(2.4, _bars_height(len(rows))), draw)


def _quality_label(row: Quality) -> str:
    return f"{Path(row.model).name}, {row.quant}"


def _quality_panel(rows: Sequence[Quality]) -> Panel:
    # No logarithm shows a model that does not differ at all.
    shown = sorted((row for row in rows if row.mean_kl > 0), key=lambda row: row.bits_per_weight)

    def draw(ax: Axes) -> None:
        for i, row in enumerate(shown):
            x, colour = row.bits_per_weight, LINES[i % len(LINES)]
            ax.plot([x, x], [row.mean_kl, row.p99_kl], color=colour, linewidth=1)
            ax.plot(x, row.p99_kl, color=colour, marker="_", markersize=8)
            marker, label = MARKERS[i % len(MARKERS)], _quality_label(row)
            ax.plot(x, row.mean_kl, color=colour, marker=marker, linestyle="", label=label)
        ax.set_title("What the bits cost", loc="left")
        ax.set_xlabel("bits per weight, scales included")
        ax.set_ylabel("KL divergence, nats a token: mean, and 99 %")
        if shown:
            ax.set_yscale("log")
            _legend(ax)
        else:
            ax.set_axis_off()
        ax.grid(alpha=0.3, which="both")

    return Panel(4.0, draw)
