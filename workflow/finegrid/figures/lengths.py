"""Figure: token lengths of prompts and answers before truncation, with the limits drawn in and the share cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from finegrid.errors import UserError
from finegrid.figures import style

SETS = 4  # data sets of a study that get a row of panels; the table has all
LONG_TAIL = 12  # a longest row of so many medians gets a logarithmic axis
SIDES = (("prompt", "Prompts", "max_input_length"), ("answer", "Answers", "max_output_length"))


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: tokens, side, split, low and high (tokens, a bin's edges), rows, share_per_token
    (of the split's rows), limit (tokens), truncated (rows)."""
    reports = _reports(study_dir)
    table = pd.concat([_table(name, report) for name, report in reports.items()], ignore_index=True)
    shown = list(reports)[:SETS]
    figure, axes = style.start(style.DOUBLE, 0.4 + 1.6 * len(shown), len(shown), 2, squeeze=False)
    splits = list(dict.fromkeys(table["split"]))
    colours = dict(zip(splits, sns.color_palette("colorblind", len(splits)), strict=True))
    for line, name in zip(axes, shown, strict=True):
        for panel, (side, title, _) in zip(line, SIDES, strict=True):
            rows = table[(table["tokens"] == name) & (table["side"] == side)]
            _histogram(panel, rows, colours)
            limit = rows["limit"].iloc[0]
            which = f"{name}\n" if len(shown) > 1 else ""
            panel.set_title(f"{which}{title}: {_cut(rows)} cut at {limit:g} tokens")
            panel.set_xlabel("Length (tokens)")
        line[0].set_ylabel("Rows per token (%)")
    handles = [
        Patch(facecolor=colours[split], alpha=0.45, label=split)
        if split == "train"
        else Line2D([], [], color=colours[split], label=split)
        for split in splits
    ]
    handles.append(Line2D([], [], color="0.1", linestyle="--", linewidth=1, label="limit"))
    more = f"{len(shown)} of {len(reports)} data sets" if len(shown) < len(reports) else None
    style.legend(figure, handles, more)
    style.message(figure, _message(table))
    return figure, table


def _reports(study_dir: Path) -> dict[str, dict]:
    paths = sorted((study_dir / "data").glob("*.json"))
    if not paths:
        raise UserError(f"{study_dir / 'data'}: no token report; expected one for each data set of the study")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _table(name: str, report: dict) -> pd.DataFrame:
    parts = []
    for split, content in report["splits"].items():
        for side, _, limit in SIDES:
            lengths = content.get(f"{side}_lengths") or {}
            counts, edges = (
                np.asarray(lengths.get("counts") or [], float),
                np.asarray(lengths.get("edges") or [], float),
            )
            if not counts.sum():
                continue
            counts, edges = _merged(counts, edges)
            part = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "rows": counts.astype(int)})
            part["share_per_token"] = counts / counts.sum() / np.diff(edges)
            part["limit"], part["truncated"] = report["limits"][limit], content[f"truncated_{side}s"]
            part["longest"], part["median"] = lengths["quantiles"]["max"], lengths["quantiles"]["50"]
            parts.append(part.assign(tokens=name, side=side, split=split))
    if not parts:
        raise UserError(f"data/{name}.json: no lengths of any row; expected those of the training rows at least")
    columns = [
        "tokens",
        "side",
        "split",
        "low",
        "high",
        "rows",
        "share_per_token",
        "limit",
        "truncated",
        "median",
        "longest",
    ]
    return pd.concat(parts, ignore_index=True)[columns]


def _merged(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring bins put together until there are about twice the cube root of the rows (Rice's rule): the report's
    bins are fine enough for a large split, and noise for a small one."""
    step = max(1, round(len(counts) / (2 * counts.sum() ** (1 / 3))))
    starts = np.arange(0, len(counts), step)
    return np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])


def _histogram(panel, rows: pd.DataFrame, colours: dict) -> None:
    """Train filled, the other splits as outlines on top."""
    for split, part in rows.groupby("split", sort=False):
        edges = np.append(part["low"], part["high"].iloc[-1])
        fill = split == "train"
        panel.stairs(
            100 * part["share_per_token"],
            edges,
            color=colours[split],
            fill=fill,
            alpha=0.45 if fill else 1,
            linewidth=1,
        )
    limit, longest = rows["limit"].iloc[0], max(rows["longest"].max(), rows["high"].max())
    panel.axvline(limit, color="0.1", linestyle="--", linewidth=1)
    panel.set_ylim(bottom=0)
    if longest > LONG_TAIL * rows["median"].min():
        panel.set_xscale("log")
        panel.set_xlim(max(1, rows["low"].min()), max(longest, limit) * 1.1)
    else:
        panel.set_xlim(0, max(longest, limit) * 1.05)


def _cut(rows: pd.DataFrame) -> str:
    """Share of the training rows that were cut (of the first split where train has none)."""
    split = "train" if (rows["split"] == "train").any() else rows["split"].iloc[0]
    part = rows[rows["split"] == split]
    return _percent(part["truncated"].iloc[0] / part["rows"].sum())


def _percent(share: float) -> str:
    return "none" if share == 0 else f"{share:.1%}".replace("%", " %") if share >= 0.001 else "<0.1 %"


def _message(table: pd.DataFrame) -> str:
    first = table["tokens"].iloc[0]
    sentences = []
    for side, title, _ in SIDES:
        rows = table[(table["tokens"] == first) & (table["side"] == side)]
        if len(rows):
            sentences.append(f"{_cut(rows)} of the {title.lower()} at {rows['limit'].iloc[0]:g} tokens")
    many = table["tokens"].nunique()
    where = f" (first of {many} data sets)" if many > 1 else ""
    return f"Cut in training: {', '.join(sentences)}{where}"
