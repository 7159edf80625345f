"""What is written down of one run beside what it made: its settings, and the provenance of training and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout, provenance
from finegrid.fingerprint import code_fingerprint, short_hash
from finegrid.staging import CODE, evaluation_places, training_facts, training_inputs, training_places

if TYPE_CHECKING:
    from finegrid.study import Run, Study

MadeAt = dict[str, object]


def training_record(study: Study, run: Run, made_at: MadeAt, command: str, folder: Path | None = None) -> dict:
    """Return the provenance of a training.

    Args:
        made_at: the commit at which it began, see :func:`finegrid.provenance.commit`.
        folder: where its pack has staged it; default: it is in place.
    """
    places = training_places(study, run)
    lying = {name: folder / name if folder else path for name, path in places.items()}
    summary = json.loads(lying["summary.json"].read_text(encoding="utf-8"))
    return provenance.record(
        Path.cwd(),
        inputs=training_inputs(run),
        made_at=made_at,
        **_facts(study, run, summary["device"], command),
        outputs=provenance.hashes_of(places["weights"], lying["weights"]),
        data_version=provenance.data_version(layout.tokens_folder(run) / "report.json"),
        **training_facts(run),
    )


def evaluation_record(
    study: Study,
    run: Run,
    made_at: MadeAt,
    device: str,
    command: str,
    folder: Path | None = None,
    summary: Path | None = None,
) -> dict:
    """Return the provenance of a scoring, an untrained model's too.

    Args:
        folder: where its pack has staged it; default: it is in place.
        summary: of the training, if that is not in place.
    """
    places, tokens = evaluation_places(study, run), layout.tokens_folder(run)
    inputs = {"model": layout.MODELS / f"{layout.model_name(run.settings.model)}.json"}
    if run.method != "base":
        inputs["training"] = training_places(study, run)["summary.json"]
    inputs |= {split: tokens / f"{split}.arrow" for split in ("validation", "test")}
    predictions = "predictions.jsonl"
    return provenance.record(
        Path.cwd(),
        inputs=inputs,
        made_at=made_at,
        lying={"training": summary} if summary else None,
        **_facts(study, run, device, command),
        data_version=provenance.data_version(tokens / "report.json"),
        settings_hash=short_hash(run.settings.evaluation_settings()),
        code=code_fingerprint(CODE["evaluate"]),
        outputs=provenance.hashes_of(places[predictions], folder / predictions if folder else None),
    )


def _facts(study: Study, run: Run, device: str, command: str) -> dict[str, Any]:
    return {
        "study": study.name,
        "run": run.id,
        "data": f"{run.dataset}-{run.data_id}",
        "model": run.settings.model.model_name_or_path,
        "device": device,
        "seed": run.seed,
        "command": command,
    }
