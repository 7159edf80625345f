"""The recipe: the settings of one run, as strict models with the keys of the libraries that use them.

A recipe is read from YAML (:func:`load_recipe`), old names are mapped, numbers are read as numbers however YAML
reads them, and every section is checked for names and types before anything runs. Nothing here imports torch or
transformers: the keys of the libraries come from ``library_keys.json``, which a test holds equal to the
installed libraries.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """The base model."""

    model_name_or_path: str = Field(description="Folder relative to the project, or hub id (then with `revision`).")
    revision: str | None = Field(None, description="Commit of the hub repository; required for a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the stored weights; compute in bf16 is `training_args.bf16`."
    )
    attn_implementation: str | None = Field(None, description="As in transformers; None lets transformers choose.")
    chat_template: str | None = Field(None, description="Path of a Jinja file that replaces the tokenizer's template.")
    trust_remote_code: bool = Field(False, description="Run code from the model's repository: off unless you say so.")


class Cleaning(Section):
    """Cleaning steps, in the order in which they run; each can be switched, each counts what it did."""

    fix_unicode: bool = Field(True, description="Mend broken Unicode (mojibake) with ftfy.")
    nfc: bool = Field(True, description="Normalise to Unicode NFC.")
    control_characters: bool = Field(True, description="Remove control characters (line breaks and tabs stay).")
    white_space: bool = Field(True, description="Fold runs of spaces, trim lines and ends, keep line breaks.")
    empty: bool = Field(True, description="Reject rows with an empty prompt or an empty answer.")
    min_prompt_chars: int = Field(0, ge=0, description="Reject rows whose prompt (all but the answer) is shorter.")
    max_prompt_chars: int | None = Field(None, ge=1, description="Reject rows whose prompt is longer.")
    min_answer_chars: int = Field(0, ge=0, description="Reject rows whose last assistant message is shorter.")
    max_answer_chars: int | None = Field(None, ge=1, description="Reject rows whose last assistant message is longer.")
    exact_duplicates: bool = Field(True, description="Within a split, keep the first of rows with equal messages.")
    near_duplicates: bool = Field(False, description="Within train, keep the first of near-duplicate rows (MinHash).")
    near_duplicate_threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of word 3-grams.")
    leaked_questions: bool = Field(True, description="Reject rows of train whose question is in validation or test.")
    leaked_answers: bool = Field(True, description="Reject rows of train whose answer is in validation or test.")
    leaked_near: bool = Field(False, description="Reject rows of train that nearly duplicate one held out.")


class Truncation(Section):
    """What happens to a side that is longer than its limit. Template tokens and roles are never cut."""

    input: Literal["left", "right", "middle", "drop", "error"] = Field(
        "left", description="Prompt over `max_input_length`: which part is cut away, or drop the row, or stop."
    )
    output: Literal["left", "right", "middle", "drop", "error"] = Field(
        "right", description="Answer over `max_output_length`; a cut answer gets no end-of-text label."
    )


class Limits(Section):
    """Past these shares the data stage stops and says what to change."""

    truncated_answers: float = Field(0.05, ge=0, le=1, description="Share of train rows with a cut answer.")
    dropped: float = Field(0.10, ge=0, le=1, description="Share of imported train rows rejected or dropped.")
    leaked: int = Field(0, ge=0, description="Rows of train left that share a question or answer with held-out rows.")


class HubDataset(Section):
    """A hub data set at a pinned revision (read by `datasets`)."""

    path: str
    name: str | None = None
    revision: str | None = Field(None, description="Commit of the hub repository; required unless `path` is a folder.")
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None


class DataConfig(Section):
    """The data strategy: what the run learns from."""

    name: str | None = Field(None, description="Name of the data set in paths; default: folder of the train file.")
    train_file: str | list[str] | None = Field(None, description="json, jsonl, csv or parquet, plain or .gz.")
    val_file: str | list[str] | None = None
    test_file: str | list[str] | None = None
    dataset: HubDataset | None = Field(None, description="A hub data set instead of files.")
    format: Literal["auto", "conversations", "messages", "sharegpt", "alpaca", "prompt_completion", "columns"] = Field(
        "auto", description="Recognised by content unless named; the report tells which."
    )
    columns: dict[Literal["prompt", "answer", "system", "id"], str] | None = Field(
        None, description="For `format: columns`: which column is the prompt, the answer, the system message, the id."
    )
    encoding: str = "utf-8"
    system_prompt: str | None = Field(None, description="System message for rows that have none.")
    num_proc: int = Field(1, ge=1, description="Processes for cleaning and tokenising; changes no result.")
    streaming: bool = Field(False, description="Read the train split as a stream: needs `training_args.max_steps`.")
    validation_size: float | int | None = Field(
        None, description="Rows (int) or share (float) split off train when there is no validation file."
    )
    test_size: float | int | None = Field(None, description="The same for test.")
    max_train_samples: int | None = Field(None, ge=1, description="Rows kept of train after cleaning, drawn by seed.")
    max_validation_samples: int | None = Field(None, ge=1)
    max_test_samples: int | None = Field(None, ge=1)
    train_fraction: float | None = Field(None, gt=0, le=1, description="Share of the cleaned train rows kept.")
    sample_seed: int = Field(0, description="Seed of every draw of rows; independent of the run's seed.")
    cleaning: Cleaning = Cleaning()
    truncation: Truncation = Truncation()
    limits: Limits = Limits()


class Evaluation(Section):
    """How a run is scored."""

    split: Literal["test", "validation"] = Field("test", description="Split that the comparison reads.")
    generate: bool = Field(True, description="Generate answers; False scores the loss alone.")
    batch_size: int = Field(16, ge=1, description="Rows in one generation batch; changes no result.")
    language: Literal["auto", "en", "zh"] = Field("auto", description="Word segmentation of metrics (jieba for zh).")


class RunSettings(Section):
    """All settings of one run. `training_args`, `peft_config`, `quantization_config` and `generation_config` are
    plain dicts with the libraries' own keys, checked against `library_keys.json`; a null `peft_config` is full
    fine-tuning."""

    model: ModelSettings
    data_config: DataConfig = DataConfig()
    max_input_length: int = Field(512, ge=1, description="Tokens of the prompt, template included.")
    max_output_length: int = Field(512, ge=1, description="Tokens of the answer, its end-of-text included.")
    training_args: dict[str, Any] = Field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] = Field(default_factory=dict)
    evaluation: Evaluation = Evaluation()

    @property
    def method(self) -> str:
        """`full`, `lora`, `qlora`, `ia3`, …: the first part of the run's id."""
        if self.peft_config is None:
            return "full"
        kind = str(self.peft_config.get("peft_type", "LORA")).lower()
        return f"q{kind}" if self.quantization_config else kind
