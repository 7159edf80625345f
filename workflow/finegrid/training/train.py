"""Train one run: token rows and a base model in, an adapter (or a whole model), its history and a summary out.

Reads ``tokens/{train,validation}.arrow`` and the base model's folder. Writes, when all went well and only then,

- ``output/``: what plain peft (``PeftModel.from_pretrained``) or plain transformers loads; safetensors;
- ``history``: CSV of :mod:`finegrid.training.history`;
- ``summary``: JSON of one object, the columns of the results.

While it trains, checkpoints and a live ``history.csv`` lie in ``checkpoints``, a scratch folder of its own: the next
call with the same settings, data, model and library versions goes on from the last complete one, on the CPU to the
same bits. With anything of that changed it starts anew. The folder is removed when the output is in place, whatever
``save_total_limit`` says: checkpoints are there for resuming.

Trackers of ``report_to`` write where they always do, except for TensorBoard: ``<checkpoints>/../tensorboard/<run>``
(or ``$TENSORBOARD_LOGGING_DIR``), so that one ``tensorboard --logdir scratch/<study>/tensorboard`` shows a study and
the logs stay when the checkpoints go.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if not torch.cuda.is_available():
    # Else deepspeed, which transformers imports where it is installed, warns that it guesses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import transformers
from datasets import Dataset
from transformers import PrinterCallback, Seq2SeqTrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torch_bf16_gpu_available

from finegrid.errors import UserError
from finegrid.files import write_json
from finegrid.precision import cpu_chooses_bf16, width_of
from finegrid.training.history import HistoryFile, history_rows, write_history
from finegrid.training.joint import JointPass, keep_company
from finegrid.training.model import attach_adapter, load_base
from finegrid.training.progress import EarlyStopping, FactsTold, Flow, ProgressLines
from finegrid.training.stopping import Stop, Stopped
from finegrid.training.trainer import EvaluationLeft, LabelTokenTrainer, is_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finegrid.settings import RunSettings
    from finegrid.training.lockstep import Lane
    from finegrid.training.trainer import BaseLosses

Progress = Callable[[str], None]
# Ours, whatever the recipe says: where files go, what the trainer may drop, and that no NaN is filtered from sight.
OURS = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}
NOT_PASSED = ("output_dir", "resume_from_checkpoint")


def train(
    settings: RunSettings,
    tokens: Path,
    model: Path,
    output: Path,
    history: Path,
    summary: Path,
    checkpoints: Path,
    progress: Progress = lambda line: None,
    tell: Callable[..., None] = lambda **facts: None,
    stop: Stop | None = None,
    load: Callable[..., PreTrainedModel] = load_base,
    company: tuple[Lane, JointPass] | None = None,
    base_losses: BaseLosses | None = None,
    validated: Callable[[list[float]], None] = lambda losses: None,
) -> dict[str, Any]:
    """Train one run, see the module, and return its summary.

    The summary's numbers: ``seconds`` are training time without start-up, evaluations and checkpoints; memory is the
    peak in MiB (of the process on the CPU, of torch's allocator on a GPU); losses are natural logarithms a label token.

    Args:
        tokens: folder of the token files.
        model: folder of the base model.
        output: folder to make, replaced if it exists.
        checkpoints: scratch folder of this run alone; its name is the run's name in trackers.
        progress: gets a short line every ten seconds or so.
        tell: gets facts of the run as it goes, as :class:`finegrid.training.progress.FactsTold` names them.
        stop: who knows whether the process was asked to end; then it saves a checkpoint at the end of the step.
        load: gives the base model, as ``load_base`` does; in a pack the runs share its weights.
        company: the run's lane and who makes its steps together with other runs' ones, where it can be.
        base_losses: what runs on this base and these rows know of its validation loss, and are to add to.
        validated: gets the losses of the validation rows with the saved weights, where they are what scoring gives.

    Raises:
        UserError: settings that the libraries refuse, no rows to train on, a loss or gradient that is no number.
        Stopped: the process was asked to end; the next call goes on from the checkpoint.
    """
    transformers.utils.logging.disable_progress_bar()
    rows, validation = _read_rows(tokens, "train"), _read_rows(tokens, "validation")
    if not len(rows):
        raise UserError(f"{tokens / 'train.arrow'}: no rows to train on; expected at least one")

    if settings.quantization_config and settings.peft_config is None:
        raise UserError("quantization_config: quantised weights can't be trained; add a peft_config, or remove it")

    notes: list[str] = []
    if settings.peft_config is None and settings.model.dtype != "float32":
        notes.append(
            f"weights in {settings.model.dtype} lose small updates to rounding; float32 with bf16 compute doesn't"
        )
    width = width_of(json.loads((model / "config.json").read_text(encoding="utf-8")))
    args = training_arguments(settings, checkpoints, has_validation=len(validation) > 0, notes=notes, width=width)
    # The machine may have chosen it: a job that is requeued on another one doesn't go on in another type.
    identity = _identity(settings, tokens, model) | {"compute type": _compute(settings, args)}
    with args.main_process_first(local=False, desc="look for checkpoints"):  # the folder is all nodes' own
        checkpoint = find_checkpoint(checkpoints, identity, notes, args.world_size)
    args.eval_on_start = checkpoint is None and len(validation) > 0

    if settings.quantization_config and is_deepspeed_zero3_enabled():
        raise UserError(
            "training_args.deepspeed: ZeRO 3 can't divide quantised weights; use config/deepspeed/zero2.json, or no "
            "quantization_config"
        )

    progress("loading the model")
    if args.deepspeed:
        import deepspeed

        if args.device.type == "cpu":
            # Else it compiles collectives of its own, which needs a compiler and 20 s; gloo does.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # transformers doesn't on the CPU, and ZeRO 3 divides the weights as they load
    set_seed(args.seed)
    base = load(settings, model, args.device)
    notes += getattr(base, "loading_notes", [])
    use_cache = base.config.use_cache
    trainer = _trainer(settings, attach_adapter(settings, base), args, rows, validation, checkpoints, progress)
    trainer.add_callback(FactsTold(tell, trainer))
    if checkpoint is None:
        _forget_logs(trainer, checkpoints)
    else:
        progress(f"going on from step {_step(checkpoint)}")
    trainer.stop = stop or trainer.stop
    trainer.base_losses = trainer.base_losses if base_losses is None else base_losses
    if company is not None:
        notes += keep_company(trainer, *company)
    try:
        with trainer.stop.waits():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            _note_early_stop(settings, trainer, notes)
            final_loss = _final_evaluation(trainer, notes)
            _stop_if_asked(trainer)
            tell(state="saving")
            base.config.use_cache = use_cache
            result = _summary(settings, trainer, final_loss, checkpoint, notes + trainer.notes)
            _write_weights(settings, trainer, model, output)
            if trainer.row_losses is not None:
                validated(trainer.row_losses)
            if trainer.is_world_process_zero():
                write_history(history, history_rows(trainer.state.log_history))
                write_json(summary, result)
            _stop_if_asked(trainer)  # a job that is ended fails, and what it wrote is removed: keep the checkpoint
    except Stopped as request:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        kept = "its checkpoint is saved, the same command goes on from there" if step else "nothing was to save yet"
        progress(f"stopped by {request.signal.name} after step {step}/{steps}: {kept}")
        raise
    if trainer.is_world_process_zero():
        _clear(checkpoints)
    progress(f"done: {result['steps']} steps in {result['train_seconds']:.0f} s")
    return result


def _note_early_stop(settings: RunSettings, trainer: LabelTokenTrainer, notes: list[str]) -> None:
    if settings.early_stopping and trainer.state.global_step < trainer.state.max_steps:
        notes.append(
            f"stopped early after step {trainer.state.global_step} of {trainer.state.max_steps}: no lower validation "
            f"loss in {settings.early_stopping.patience} evaluations"
        )


def _stop_if_asked(trainer: LabelTokenTrainer) -> None:
    if trainer.is_asked_to_stop():
        trainer.stop_here()


def training_arguments(
    settings: RunSettings, checkpoints: Path, has_validation: bool, notes: list[str], width: int | None = None
) -> Seq2SeqTrainingArguments:
    """Return the Trainer's arguments of a recipe, with what Finegrid decides; ``notes`` gets what was chosen.

    Args:
        width: the model's hidden size, see :mod:`finegrid.precision`.

    Raises:
        UserError: DeepSpeed without a launcher, or values that transformers refuses together.
    """
    values = {
        key: value for key, value in settings.training_args.items() if key not in NOT_PASSED and value is not None
    }
    if values.get("deepspeed") and "RANK" not in os.environ:
        raise UserError(
            "training_args.deepspeed: DeepSpeed needs torchrun, also for one process; `finegrid train` starts it itself"
        )
    values |= OURS | {"output_dir": str(checkpoints)}
    if not torch.accelerator.is_available():
        values["use_cpu"] = True  # else transformers refuses bf16, which the CPU can do
    if values.get("load_best_model_at_end") and values.get("save_total_limit") == 1:
        # The Trainer keeps the best and the last one with either, but with 1 it removes the last before training's end
        # is evaluated: a run that is stopped there would train again what comes after the best.
        values["save_total_limit"] = 2
    values.setdefault("run_name", checkpoints.name)
    values.setdefault("report_to", "none")
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if not has_validation:
        if values.get("load_best_model_at_end"):
            raise UserError("training_args.load_best_model_at_end: there are no validation rows to find the best by")
        values["eval_strategy"] = "no"
        notes.append("no validation rows: nothing was evaluated while training")
    if values.get("metric_for_best_model", "loss") not in ("loss", "eval_loss"):
        raise UserError(
            f"training_args.metric_for_best_model: '{values['metric_for_best_model']}' is not computed while training; "
            "expected 'loss'"
        )
    if "bf16" not in values and not values.get("fp16") and not values.get("use_cpu") and is_torch_bf16_gpu_available():
        values["bf16"] = True
        notes.append("bf16 compute: chosen because the GPU has it and the recipe doesn't say")
    if values.get("use_cpu") and cpu_chooses_bf16(settings, width):
        values["bf16"] = True
        notes.append(
            f"bf16 compute: chosen because this processor has instructions for it, the model is {width} wide, and the "
            "recipe doesn't say"
        )
    try:
        args = Seq2SeqTrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training_args: {error}") from error
    processes = settings.gpus * settings.nodes
    if args.world_size != processes:
        product = f"{settings.gpus} × {settings.nodes} nodes = {processes}" if settings.nodes > 1 else str(processes)
        raise UserError(
            f"gpus: the recipe asks for {product}, but {args.world_size} processes train; expected as many, "
            "since each has per_device_train_batch_size rows (`finegrid train` starts them itself)"
        )
    if args.n_gpu > 1:
        notes.append(f"1 of {args.n_gpu} visible GPUs was used: the recipe asks for no more")
        args._n_gpu = 1
    return args


# ---------------------------------------------------------------- resuming


def find_checkpoint(checkpoints: Path, identity: dict[str, str], notes: list[str], processes: int = 1) -> Path | None:
    """Return the last complete checkpoint that belongs to the same run, or None; what can't be used is removed.

    Args:
        identity: what must be the same, by name; written beside the checkpoints.
        notes: gets a sentence if checkpoints were there and didn't fit.
    """
    path = checkpoints / "identity.json"
    found = sorted((folder for folder in checkpoints.glob("checkpoint-*") if folder.is_dir()), key=_step)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if found and known != identity:
        changed = ", ".join(name for name in identity if known.get(name) != identity[name])
        notes.append(f"started anew: the checkpoints at hand were of other {changed}")
    complete = [folder for folder in found if known == identity and is_complete(folder, processes)]
    for folder in found:
        if folder not in complete:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(path, identity)
    return complete[-1] if complete else None


def _identity(settings: RunSettings, tokens: Path, model: Path) -> dict[str, str]:
    sections = {"model", "training_args", "peft_config", "quantization_config", "gpus", "nodes", "early_stopping"}
    parts = settings.model_dump(include=sections, mode="json")
    deepspeed = settings.training_args.get("deepspeed")
    if isinstance(deepspeed, str) and Path(deepspeed).is_file():
        parts["deepspeed"] = json.loads(Path(deepspeed).read_text())
    weights = {path.name: path.stat().st_size for path in sorted(model.iterdir()) if path.is_file()}
    return {
        "settings": _digest(json.dumps(parts, sort_keys=True).encode()),
        "tokens": _digest(*(_file_digest(tokens / f"{split}.arrow") for split in ("train", "validation"))),
        "model": _digest(json.dumps(weights).encode(), (model / "config.json").read_bytes()),
        "library versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _clear(checkpoints: Path) -> None:
    """Remove what this module made in the scratch folder, and the folder if nothing else is in it."""
    for folder in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("identity.json", "history.csv"):
        (checkpoints / name).unlink(missing_ok=True)
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()


# ---------------------------------------------------------------- the trainer


def _read_rows(tokens: Path, split: str) -> Dataset:
    path = tokens / f"{split}.arrow"
    try:
        return Dataset.from_file(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); expected what `finegrid tokenise` writes") from error


def _trainer(
    settings: RunSettings,
    model: torch.nn.Module,
    args: Seq2SeqTrainingArguments,
    rows: Dataset,
    validation: Dataset,
    checkpoints: Path,
    progress: Progress,
) -> LabelTokenTrainer:
    if settings.peft_config is not None and args.activation_checkpointing:
        # Else nothing before the first adapter requires a gradient, and reentrant checkpointing gives none.
        model.enable_input_require_grads()
    callbacks = [Flow(), HistoryFile(checkpoints / "history.csv")]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping.patience, settings.early_stopping.threshold))
    try:
        trainer = LabelTokenTrainer(
            model,
            args,
            rows,
            validation if len(validation) else None,
            padding_free=settings.training.padding_free,
            callbacks=callbacks,
        )
    except (ImportError, RuntimeError) as error:
        if "requires" not in str(error):
            raise
        raise UserError(f"training_args.report_to: {error}") from error
    trainer.add_callback(ProgressLines(progress, lambda: trainer.last_loss))
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(_tensorboard(checkpoints))
    return trainer


def _tensorboard(checkpoints: Path) -> Path:
    return checkpoints.parent / "tensorboard" / checkpoints.name


def _forget_logs(trainer: LabelTokenTrainer, checkpoints: Path) -> None:
    """Remove TensorBoard's events of an attempt that this one doesn't continue."""
    if trainer.is_world_process_zero():
        shutil.rmtree(_tensorboard(checkpoints), ignore_errors=True)


def _final_evaluation(trainer: LabelTokenTrainer, notes: list[str]) -> float | None:
    """Return the validation loss of the weights that are saved; as the history's last row unless it is there."""
    if trainer.eval_dataset is None:
        return None
    try:
        return _final_loss(trainer, notes)
    except EvaluationLeft:
        trainer.stop_here()


def _final_loss(trainer: LabelTokenTrainer, notes: list[str]) -> float:
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step not in (None, trainer.state.global_step):
        # Another step's weights: not a row of the history's end.
        notes.append(f"the weights are those of step {trainer.state.best_global_step}, the best by validation loss")
        return trainer.validation_loss(trainer.eval_dataset)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1:]
    if last and last[0]["step"] == trainer.state.global_step:
        return last[0]["eval_loss"]
    return trainer.evaluate()["eval_loss"]


# ---------------------------------------------------------------- what is written


def _summary(
    settings: RunSettings,
    trainer: LabelTokenTrainer,
    final_loss: float | None,
    checkpoint: Path | None,
    notes: list[str],
) -> dict[str, Any]:
    args, counters, log = trainer.args, trainer.counters, trainer.state.log_history
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    trainable, total = _parameters(trainer.model)
    return {
        "method": settings.method,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "label_tokens": counters.label_tokens,
        "tokens": counters.tokens,
        "train_seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.tokens / counters.seconds, 2) if counters.seconds else None,
        "peak_memory_mb": round(trainer.peak_memory_mb(), 1),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "device": _device_name(args.device),
        "dtype": _stored(settings),
        "compute_dtype": _compute(settings, args),
        "effective_batch_size": trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "train_loss": counters.loss_sum / counters.label_tokens if counters.label_tokens else None,
        "base_eval_loss": next((loss for step, loss in evaluations if step == 0), None),
        "final_eval_loss": final_loss,
        "best_eval_loss": min((loss for step, loss in evaluations if step), default=None),
        "resumed_from": _step(checkpoint) if checkpoint else None,
        "notes": notes,
    }


def _parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters; one packed in 4 bits counts as one."""
    if is_deepspeed_zero3_enabled():  # each process holds a part of them
        sizes = [(parameter.ds_numel, parameter.requires_grad) for parameter in model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    return model.num_parameters(only_trainable=True), model.num_parameters()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _stored(settings: RunSettings) -> str:
    config = settings.quantization_config
    if not config:
        return settings.model.dtype
    return config.get("bnb_4bit_quant_type", "fp4") if config.get("load_in_4bit") else "int8"


def _compute(settings: RunSettings, args: Seq2SeqTrainingArguments) -> str:
    """Return the type that matrix products compute in: autocast's, else the quantisation's, else the weights'."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    if (settings.quantization_config or {}).get("load_in_4bit"):
        return str(settings.quantization_config.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return settings.model.dtype


def _write_weights(settings: RunSettings, trainer: LabelTokenTrainer, model: Path, output: Path) -> None:
    """Save the adapter or the model beside ``output`` and put it in its place as a whole."""
    half = output.with_name(f".{output.name}.half")
    main = trainer.is_world_process_zero()
    if main:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
        trainer._save(str(half))  # `save_model` would save tied weights twice, and gather what is whole
    else:
        trainer.save_model(str(half))  # by every process: sharded weights are gathered
    if not main:
        return
    for name in ("training_args.bin", "README.md"):  # a pickle, and peft's empty card with this machine's path
        (half / name).unlink(missing_ok=True)
    if settings.peft_config is None:
        _write_tokenizer(settings, model, half)
    else:
        _name_base(settings, half / "adapter_config.json")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(half, output)


def _write_tokenizer(settings: RunSettings, model: Path, output: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=settings.model.trust_remote_code)
    if settings.model.chat_template:
        tokenizer.chat_template = Path(settings.model.chat_template).read_text(encoding="utf-8")
    tokenizer.save_pretrained(output)


def _name_base(settings: RunSettings, path: Path) -> None:
    """Let the adapter name its base model as the recipe does, and list its target modules in a fixed order."""
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": settings.model.model_name_or_path, "revision": settings.model.revision}
    for key in ("target_modules", "modules_to_save", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    write_json(path, config)
