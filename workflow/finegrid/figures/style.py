"""How all figures look, what they read, and how they are saved.

A figure module has `plot(study_dir)`, which returns the figure and the tidy table it shows, and
`draw(study_dir, output)`, which writes `output.pdf`, `output.png` and `output.csv`. Figures read only the small
files of `results/<study>/` that git tracks.
"""

from __future__ import annotations

import json
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: a cluster node has no display

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.analysis.scores import METRIC_NAMES, Arm, Plan, load_plan
from finegrid.errors import UserError
from finegrid.figures import design
from finegrid.figures.stamp import pdf_metadata, png_metadata
from finegrid.files import whole

SINGLE, DOUBLE = 3.3, 6.8  # column widths in inches
POINTS = 8
DPI = 300
FEW = 8  # arms that a legend names one by one, each in a colour that all readers can tell
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Arial Unicode MS",
)
CJK_FILES = ("cjk", "wqy", "sourcehan", "droidsansfallback", "simhei", "msyh")
MARKERS = "osD^vP*X"  # a second sign of an arm beside its colour
WIDE = r"\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef"  # letters between which a line may break
PARTS = rf"[{WIDE}]\s*|[^\s{WIDE}]+\s*|\s+"
LINE = 0.165  # inches: height of a line of text
SIGN = 7  # letters: width of a legend's sign with its spaces


@dataclass(frozen=True)
class Study:
    """What figures read of `results/<study>/`: the plan and the comparison's tables, by arm name."""

    folder: Path
    plan: Plan
    arms: pd.DataFrame
    comparisons: pd.DataFrame
    comparison: dict
    colours: dict[str, tuple[float, float, float]] = field(repr=False)

    @cached_property
    def trained(self) -> list[Arm]:
        """Arms that were trained, in the plan's order."""
        trained = _trained(self.plan)
        return [arm for arm in self.plan.arms if arm.arm in trained]

    @cached_property
    def untrained(self) -> list[Arm]:
        """Base models as they are, in the plan's order."""
        trained = _trained(self.plan)
        return [arm for arm in self.plan.arms if arm.arm not in trained]

    def label(self, arm: str) -> str:
        """The arm's name in print."""
        return self._labels[arm]

    @cached_property
    def _labels(self) -> dict[str, str]:
        return {arm.arm: printable(arm.label, arm.arm) for arm in self.plan.arms}

    @cached_property
    def level_names(self) -> dict[tuple[str, str], str]:
        """What levels are called in print, (factor, level) -> name, as the arms' labels have it."""
        arms = {arm.arm: arm for arm in self.trained}
        baseline = arms[self.plan.baseline].factors if self.plan.baseline in arms else {}
        names: dict[tuple[str, str], str] = {}
        for arm in arms.values():
            for factor, name in (design.level_names(arm.label, arm.factors, baseline) or {}).items():
                names.setdefault((factor, arm.factors[factor]), printable(name, arm.factors[factor]))
        return names

    def level(self, factor: str, level: str | None) -> str:
        """A level's name in print."""
        return self.level_names.get((factor, level), design.RECIPE if level is None else level)

    @cached_property
    def _apart(self) -> set[frozenset[str]]:
        """Pairs of arms that the primary metric was shown to set apart."""
        tables = [self.comparisons.rename(columns={"baseline": "other"})]
        if (pairs := self.folder / "comparison" / "pairs.tsv").exists():
            tables.insert(0, pd.read_csv(pairs, sep="\t", dtype={"arm": str, "other": str}, keep_default_na=False))
        verdicts: dict[frozenset[str], str] = {}
        for table in tables:  # the comparison with the baseline counts where both have the pair
            rows = table[table["metric"] == self.plan.metric]
            for arm, other, found in zip(rows["arm"], rows["other"], rows["verdict"], strict=True):
                verdicts[frozenset((arm, other))] = found
        return {pair for pair, found in verdicts.items() if found in ("better", "worse")}

    def apart(self, arm: str, other: str) -> bool:
        """Whether a verdict says that one of the two arms is better in the primary metric."""
        return frozenset((arm, other)) in self._apart

    @property
    def lower_is_better(self) -> bool:
        """Whether the primary metric is one of which less is better."""
        return self.plan.metric == "loss"

    def runs(self, arm: str) -> list[str]:
        """The runs that represent the arm: its chosen tuned level, one run a seed."""
        return self.comparison["selected"][arm]["runs"]


def load_study(folder: Path) -> Study:
    """Read the plan and the comparison.

    Raises:
        UserError: a file is not there yet.
    """
    plan = load_plan(folder / "plan.json")
    paths = [folder / "comparison" / name for name in ("arms.tsv", "comparisons.tsv", "comparison.json")]
    if missing := [
        f"{path}: no such file; expected what the stage compare writes" for path in paths if not path.exists()
    ]:
        raise UserError(*missing)
    arms = pd.read_csv(paths[0], sep="\t", dtype={"arm": str, "label": str}, keep_default_na=True).set_index("arm")
    comparisons = pd.read_csv(paths[1], sep="\t", dtype={"arm": str, "baseline": str})
    comparison = json.loads(paths[2].read_text(encoding="utf-8"))
    return Study(folder, plan, arms, comparisons, comparison, arm_colours(plan))


def _trained(plan: Plan) -> set[str]:
    return {run.arm for run in plan.runs if run.train}


def arm_colours(plan: Plan) -> dict[str, tuple[float, float, float]]:
    """One colour an arm, the same in every figure: it hangs on the order of the arms in the plan alone.

    Untrained base models are grey. Up to FEW arms have the colours of seaborn's colour-blind palette; more have
    shades of viridis, which all readers tell apart by lightness; where they matter, figures add a marker.
    """
    names = _trained(plan)
    trained = [arm.arm for arm in plan.arms if arm.arm in names]
    untrained = [arm.arm for arm in plan.arms if arm.arm not in trained]
    greys = sns.color_palette("Greys_r", len(untrained) + 2)[: len(untrained)]
    palette = [
        colour for index, colour in enumerate(sns.color_palette("colorblind")) if index not in (7, 8)
    ]  # grey, yellow
    if len(trained) > len(palette):
        # Steps of the golden section: neighbours in the plan are far apart, and no two are the same.
        shades = matplotlib.colormaps["viridis"]
        palette = [shades(0.92 * (index * 0.618034 % 1))[:3] for index in range(len(trained))]
    return dict(zip(trained, palette, strict=False)) | dict(zip(untrained, greys, strict=True))


@cache
def cjk_font() -> str | None:
    """Name of an installed font with Chinese characters, or None."""
    names = set(font_manager.get_font_names())
    if not names.intersection(CJK_FONTS):  # matplotlib's list may be older than the font
        for path in sorted(font_manager.findSystemFonts()):
            if any(part in Path(path).name.lower() for part in CJK_FILES):
                font_manager.fontManager.addfont(path)
        names = set(font_manager.get_font_names())
    return next((name for name in CJK_FONTS if name in names), None)


def printable(text: str, fallback: str) -> str:
    """`text`, or `fallback` with a warning where no installed font has its characters."""
    if not any(_wide(letter) for letter in text) or cjk_font():
        return text
    warnings.warn(
        f"no font with Chinese characters is installed: {text!r} is drawn as {fallback!r}; "
        "install one (Debian: fonts-noto-cjk) and draw again",
        stacklevel=2,
    )
    return "".join("?" if _wide(letter) else letter for letter in fallback)


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


def start(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, object]:
    """A figure in our style: `plt.subplots` in inches, with a layout that leaves room for all texts.

    `height` is that of the panels with their labels; title and legend add theirs (:func:`message`, :func:`legend`).
    """
    fonts = ["DejaVu Sans"] + ([cjk_font()] if cjk_font() else [])
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "font.family": fonts,
            "font.size": POINTS,
            **dict.fromkeys(("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize"), POINTS),
            **dict.fromkeys(("legend.fontsize", "legend.title_fontsize", "figure.titlesize"), POINTS),
            "axes.linewidth": 0.6,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "0.92",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.2,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.major.size": 3,
            "ytick.major.size": 3,
            "legend.frameon": False,
            "pdf.fonttype": 42,  # TrueType: text stays text, as journals ask
            "axes.formatter.use_mathtext": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
        },
    )
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    return figure, axes


def message(figure: Figure, text: str) -> None:
    """Say the figure's one message as its title, wrapped to the figure's width."""
    title = figure.suptitle(text, x=0.01, ha="left", fontweight="bold")
    letters = cells(text)
    while title.get_window_extent().width > 0.97 * figure.bbox.width and letters > 10:
        letters -= 1
        title.set_text(wrapped(text, letters))
    figure.set_figheight(figure.get_figheight() + LINE * (title.get_text().count("\n") + 1))


def wrapped(text: str, letters: int) -> str:
    """Break text into lines of at most `letters` letters, of like lengths where no letter is Chinese; those count
    double and break anywhere, other words don't."""
    if not any(_wide(letter) for letter in text):
        needed = len(textwrap.wrap(text, letters))
        even = next(n for n in range(max(1, letters // 3), letters + 1) if len(textwrap.wrap(text, n)) <= needed)
        return textwrap.fill(text, even if needed > 1 else letters)
    lines = [""]
    for part in re.findall(PARTS, text):
        if cells(lines[-1]) + cells(part.rstrip()) > letters and lines[-1]:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def cut(text: str, letters: int) -> str:
    """The text, or as much of it as fits into so many letters with an ellipsis."""
    if cells(text) <= letters:
        return text
    kept = next(end for end in range(len(text), -1, -1) if cells(text[:end]) < letters)
    return f"{text[:kept].rstrip(' ,;')}…"


def cells(text: str) -> int:
    """Width of a text in letters."""
    return sum(2 if _wide(letter) else 1 for letter in text)


def legend(figure: Figure, handles: list[Artist], more: str | None = None) -> None:
    """A legend below the panels, in as many columns as fit; `more` says in words what it leaves out."""
    if more:
        handles = [*handles, Line2D([], [], linestyle="none", label=more)]
    if not handles:
        return
    letters = int(figure.get_figwidth() * 72 / (POINTS * 0.64))
    labels = [wrapped(handle.get_label(), letters - SIGN) for handle in handles]
    widths = [max(cells(line) for line in label.split("\n")) + SIGN for label in labels]
    # A column is as wide as its widest entry, and entries run down the columns.
    columns = next(
        n for n in range(len(labels), 0, -1) if n == 1 or sum(max(part) for part in _columns(widths, n)) <= letters
    )
    lines = max(sum(label.count("\n") + 1 for label in part) for part in _columns(labels, columns))
    figure.set_figheight(figure.get_figheight() + LINE * lines)
    options = {"loc": "outside lower center", "ncols": columns, "handlelength": 2, "columnspacing": 1.5}
    figure.legend(handles, labels, **options)


def _columns(items: list, n: int) -> list[list]:
    """Items as a legend puts them into n columns: down the first, then down the next."""
    long, rest = divmod(len(items), n)
    sizes = [long + (index < rest) for index in range(n)]
    return [items[sum(sizes[:index]) : sum(sizes[: index + 1])] for index in range(n)]


def named_arms(study: Study, order: Callable[[str], float], also: str | None = None) -> tuple[list[str], str | None]:
    """Arms that a legend names: all where they are few; else the baseline, `also`, and the best by `order` (smallest
    first). With them, what the legend leaves out, in words."""
    trained = [arm.arm for arm in study.trained]
    if len(trained) <= FEW:
        return trained, None
    best = sorted(trained, key=order)[: FEW - 3]
    named = [arm for arm in trained if arm in best or arm in (study.plan.baseline, also)]
    return named, f"and {len(trained) - len(named)} more arms: see the table"


def metric_name(study: Study, metric: str | None = None, split: str | None = None) -> str:
    """Axis label of a metric (the primary one if none is named) with its unit."""
    metric = metric or study.plan.metric
    name, split = METRIC_NAMES[metric], split or study.comparison["split"]
    if metric == "loss":
        return f"{split.capitalize()} loss (nats per label token)"
    return f"{capital(name)} on {split} (0 to 1)"


def capital(name: str) -> str:
    """A metric's name at the start of a sentence; chrF keeps its small letter."""
    return name if name.startswith("chrF") else f"{name[0].upper()}{name[1:]}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`; several names are quoted where one of them has a comma."""
    if len(names) == 1:
        return names[0]
    if any("," in name for name in names):
        names = [f"“{name}”" for name in names]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def signed(value: float) -> str:
    """A difference with three digits and a real minus sign."""
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else "0.000"


def interval(study: Study) -> str:
    """What an interval is called in a legend: with one seed it holds for the examples alone."""
    return "95 % interval" if study.arms["seeds"].max() > 1 else "95 % interval over examples alone (one seed)"


def adjusted(p: pd.Series) -> list[Artist]:
    """What a legend says of the p beside several verdicts: the intervals there are not adjusted, so one that leaves
    out 0 may stand beside "not distinguishable"."""
    return [Line2D([], [], linestyle="none", label="p adjusted (Holm)")] if p.count() > 1 else []


def verdict(arm: pd.Series, study: Study) -> str:
    """A verdict as it is printed beside a difference, with the p that decided it; of a row whose name is the arm, or
    that has a column `arm`."""
    if arm.get("arm", arm.name) == study.plan.baseline:
        return "(baseline)"
    if pd.isna(arm["p_adjusted"]):
        return "no number: diverged"
    if arm["verdict"] == "equivalent":
        return "equivalent"
    p = "p < 0.001" if arm["p_adjusted"] < 0.001 else f"p = {arm['p_adjusted']:.2g}"
    return f"{arm['verdict']} ({p})"


def seed_values(study: Study, arms: Iterable[str]) -> pd.DataFrame:
    """The primary metric of the runs that represent the arms: arm, label, run, seed, value; models without a seed are
    left out."""
    seeds = {run.run: run.seed for run in study.plan.runs}
    rows = [
        {"arm": arm, "label": study.label(arm), "run": run, "seed": seeds[run]}
        | {"value": measured(study, run, study.comparison["split"], study.plan.metric)}
        for arm in arms
        for run in study.runs(arm)
        if seeds[run] is not None
    ]
    table = pd.DataFrame(rows, columns=["arm", "label", "run", "seed", "value"])
    return table.astype({"seed": "Int64", "value": float})


def measured(study: Study, run: str, split: str, metric: str) -> float | None:
    """A run's value of a metric on a split; None where it was not measured or is no number."""
    path = study.folder / "metrics" / f"{run}.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the scores of an evaluated run")
    return json.loads(path.read_text(encoding="utf-8"))["splits"].get(split, {}).get(metric)


def few(names: list[str], many: str) -> str:
    """Up to three short names as a list, else `many`."""
    text = listed(names)
    return text if len(names) <= 3 and cells(text) <= 60 else many


def histories(study: Study, arms: Iterable[str]) -> pd.DataFrame:
    """Histories of the runs that represent the arms, one row a log event, with columns arm, run and seed."""
    seeds = {run.run: run.seed for run in study.plan.runs}
    tables = []
    for arm in arms:
        for run in study.runs(arm):
            path = study.folder / "history" / f"{run}.csv"
            if not path.exists():
                raise UserError(f"{path}: no such file; expected the history of a trained run")
            tables.append(pd.read_csv(path).assign(arm=arm, run=run, seed=seeds[run]))
    if not tables:
        raise UserError(f"{study.folder}: no arm of the study was trained; expected at least one")
    return pd.concat(tables, ignore_index=True)


def save(figure: Figure, table: pd.DataFrame, output: Path) -> None:
    """Write `output`.pdf, .png and .csv, each atomically and with the same bytes each time."""

    def write(suffix: str, writer: Callable[[Path], object]) -> None:
        with whole(output.with_name(output.name + suffix)) as half:
            writer(half)

    # Dates and programme versions would change the bytes of the same figure.
    write(".pdf", lambda path: figure.savefig(path, format="pdf", metadata=pdf_metadata()))
    write(".png", lambda path: figure.savefig(path, format="png", dpi=DPI, metadata=png_metadata()))
    write(".csv", lambda path: table.to_csv(path, index=False, lineterminator="\n", float_format="%.8g"))
    plt.close(figure)
