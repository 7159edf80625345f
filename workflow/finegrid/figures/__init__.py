"""Figures: one module a figure, drawn from tidy tables that are saved beside them."""

from __future__ import annotations

from collections.abc import Mapping

from finegrid.figures import design

# Drawn from the plan alone, before anything trains.
PLAN_FIGURES = ("grid",)
# All figures, in the report's order; each is a module here with `draw(study_dir, output)`.
FIGURES = (
    "quality",
    "effects",
    "heatmap",
    "response",
    "loss_curves",
    "cost",
    "seeds",
    "schedule",
    "memory",
    "lengths",
    *PLAN_FIGURES,
)
# Why a figure is not made, for those that not every study has.
NEEDS = {
    "effects": "two factors or more, and arms that differ in one of them alone",
    "heatmap": "two factors whose levels are combined with each other",
    "response": "a factor under `tune` with two levels or more, or one of three numbers or more",
    "seeds": "two seeds or more",
}


def fitting(plan: Mapping) -> tuple[str, ...]:
    """Return the figures that fit a study, in the order of :data:`FIGURES`.

    Args:
        plan: `plan.json`, or of it what is known before it is written: `arms` (each with `arm`, `factors`), `seeds`,
            `tune` (factor -> levels) and `compare.baseline`.
    """
    arms = {arm["arm"]: arm["factors"] for arm in plan["arms"] if arm["factors"]}
    tuned = [factor for factor, levels in (plan.get("tune") or {}).items() if len(levels) > 1]
    fits = {
        "effects": len(design.contrasts(arms, plan["compare"]["baseline"])) > 1,
        "heatmap": design.crossed(list(arms.values())),
        "response": bool(tuned or design.numeric(list(arms.values()))),
        "seeds": len(plan["seeds"]) > 1,
    }
    return tuple(name for name in FIGURES if fits.get(name, True))
