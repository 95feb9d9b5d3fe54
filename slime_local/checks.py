"""What a careful colleague sees in a command before it runs: files, folders, plug-ins, batches, memory, ports.

Nothing here loads a model. Every problem found becomes one line of one UsageError.
"""

import contextlib
import math
import os
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slime_local import tracking
from slime_local.checkpoint import find_start, saved_iterations
from slime_local.data import read_numbered_rows, row_tools, split_slice
from slime_local.errors import UsageError
from slime_local.flags import MODEL_SHAPE, REFUSED, EvalDataset, check_combinations, load_flags
from slime_local.hf_folder import (
    SAVED_FILES,
    check_hf_folder,
    load_config,
    read_json_object,
    read_safetensors_header,
    weight_files,
)
from slime_local.plugins import EQUIVALENTS, SFT_ROLLOUT, load_function
from slime_local.sampling import (
    MAX_REQUESTS,
    ParameterError,
    SamplingParams,
    eval_sampling_params,
    rollout_sampling_params,
)

PLUGIN_FLAGS = (
    "rollout_function_path",
    "eval_function_path",
    "data_source_path",
    "custom_generate_function_path",
    "custom_rm_path",
    "custom_reward_post_process_path",
    "custom_convert_samples_to_train_data_path",
    "custom_rollout_log_function_path",
    "custom_eval_rollout_log_function_path",
    "custom_tis_function_path",
    "custom_pg_loss_reducer_function_path",
    "dynamic_sampling_filter_path",
    "rollout_sample_filter_path",
    "rollout_all_samples_process_path",
)
# Besides weights, gradients and moments: interpreter, libraries, activations of one small forward pass.
WORKING_MEMORY = 1.0e9
ITERATION_FOLDER = re.compile(r"iter_\d{7,}")


def check(args: Namespace, host: str) -> None:
    """Raise UsageError with one line for each problem of the command on `host` ("local" or "slime")."""
    quick = [
        check_combinations,
        _check_folders,
        _check_iteration_folders,
        _check_batches,
        _check_sft,
        _check_policy,
        _check_data,
        _check_model_shape,
    ]
    local = [
        _check_family,
        _check_start,
        _check_top_p,
        _check_sampling,
        _check_outputs,
        _check_overwriting,
        _check_templates,
        _check_save_hf,
        tracking.check,
        _check_server,
        _check_port,
        _check_memory,
    ]
    _run_checks(args, [*quick, *(local if host == "local" else [])])
    _run_checks(args, [_check_plugins if host == "local" else _check_plugins_for_slime])


def _run_checks(args: Namespace, checks: list[Callable[[Namespace], None]]) -> None:
    lines: list[str] = []
    for one in checks:
        try:
            one(args)
        except UsageError as error:
            lines += [line for line in str(error).splitlines() if line not in lines]
    if lines:
        raise UsageError("\n".join(lines))


# ---- Folders -------------------------------------------------------------------------------------------------


def _check_folders(args: Namespace) -> None:
    if args.hf_checkpoint is None:
        raise UsageError("--hf-checkpoint is missing: the HF folder of the model")
    check_hf_folder(args.hf_checkpoint)


def _check_family(args: Namespace) -> None:
    if args.hf_checkpoint is not None:
        load_config(args.hf_checkpoint)


def _check_iteration_folders(args: Namespace) -> None:
    """slime looks for a checkpoint inside --load, finds none in an iteration's own folder, and starts elsewhere."""
    lines = [_iteration_folder_message(*folder) for folder in _checkpoint_folders(args) if _is_iteration(folder[1])]
    if lines:
        raise UsageError("\n".join(lines))


def _iteration_folder_message(flag: str, value: str, step_flag: str) -> str:
    folder, step = Path(value).parent, int(Path(value).name.removeprefix("iter_"))
    message = f"{flag} {value} is one iteration's folder: give {flag} {folder} {step_flag} {step}"
    if flag == "--load":
        message += f" to continue that run, or --ref-load {folder} --ref-ckpt-step {step} to start another from it"
    return message


def _is_iteration(folder: str) -> bool:
    return ITERATION_FOLDER.fullmatch(Path(folder).name) is not None


def _checkpoint_folders(args: Namespace) -> list[tuple[str, str, str]]:
    folders = [("--load", args.load, "--ckpt-step"), ("--ref-load", args.ref_load, "--ref-ckpt-step")]
    return [folder for folder in folders if folder[1]]


def _check_start(args: Namespace) -> None:
    told_already = any(_is_iteration(folder) for _, folder, _ in _checkpoint_folders(args))
    if args.hf_checkpoint is not None and not args.debug_rollout_only and not told_already:
        find_start(args)


def _check_outputs(args: Namespace) -> None:
    lines = []
    for name in ("save", "save_hf", "tensorboard_dir"):
        value = getattr(args, name)
        in_the_way = [str(path) for path in (Path(value), *Path(value).parents) if path.is_file()] if value else []
        if in_the_way:
            lines.append(f"--{name.replace('_', '-')} {value}: {in_the_way[0]} is a file: give a folder")
    if lines:
        raise UsageError("\n".join(lines))


def _check_overwriting(args: Namespace) -> None:
    """A new run must not write over the checkpoints of another one."""
    there = saved_iterations(args.save) if args.save else []
    resumes = args.load is not None and os.path.realpath(args.load) == os.path.realpath(args.save or "")
    if there and not resumes:
        raise UsageError(
            f"--save {args.save} already holds iteration {there[-1]}: add --load {args.save} to continue that run, "
            "or save to another folder"
        )


def _check_templates(args: Namespace) -> None:
    lines = []
    for name in ("save_hf", "save_debug_rollout_data", "save_debug_train_data", "load_debug_rollout_data"):
        try:
            (getattr(args, name) or "").format(rollout_id=0)
        except (LookupError, ValueError, AttributeError):
            flag = "--" + name.replace("_", "-")
            lines.append(f"{flag} {getattr(args, name)}: {{rollout_id}} is all that can be filled in")
    if lines:
        raise UsageError("\n".join(lines))


def _check_save_hf(args: Namespace) -> None:
    """The folder is replaced as a whole at each save: nothing else may be in it."""
    if not args.save_hf:
        return
    with contextlib.suppress(LookupError, ValueError, AttributeError):  # _check_templates says so
        folders = {args.save_hf.format(rollout_id=rollout_id) for rollout_id in range(args.num_rollout or 1)}
        for folder in sorted(folders):
            _check_replaced(Path(folder), args)


def _check_replaced(folder: Path, args: Namespace) -> None:
    for flag in ("save", "load", "ref_load", "hf_checkpoint"):
        kept = getattr(args, flag)
        if kept and Path(kept).resolve().is_relative_to(folder.resolve()):
            name = flag.replace("_", "-")
            raise UsageError(f"--save-hf {folder} would replace --{name} {kept}: choose a folder of its own")
    others = sorted({path.name for path in folder.iterdir()} - SAVED_FILES) if folder.is_dir() else []
    if others:
        raise UsageError(f"--save-hf {folder} would replace {others[0]!r} there: choose a folder of its own")


# ---- Flags against each other --------------------------------------------------------------------------------


def _check_batches(args: Namespace) -> None:
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    if args.global_batch_size < 1 or samples % args.global_batch_size:
        raise UsageError(
            f"a rollout has {args.rollout_batch_size} x {args.n_samples_per_prompt} = {samples} samples, which is not "
            f"a multiple of --global-batch-size {args.global_batch_size}: the rest would be dropped"
        )


def _check_sft(args: Namespace) -> None:
    if args.rollout_function_path != SFT_ROLLOUT:
        return
    if args.loss_type != "sft_loss":
        raise UsageError(f"the SFT rollout with --loss-type {args.loss_type} trains nothing: add --loss-type sft_loss")
    if args.n_samples_per_prompt != 1:
        raise UsageError(f"SFT takes each dialogue once: --n-samples-per-prompt is {args.n_samples_per_prompt}, not 1")
    if args.apply_chat_template:
        raise UsageError("the SFT rollout renders the messages itself: leave out --apply-chat-template")


def _check_policy(args: Namespace) -> None:
    if args.debug_train_only or args.rollout_function_path == SFT_ROLLOUT or args.loss_type == "sft_loss":
        return
    rewards = (args.custom_generate_function_path, args.custom_rm_path, args.rm_type)
    if args.rollout_function_path in EQUIVALENTS and not any(rewards):
        raise UsageError("nothing sets a reward: add --custom-generate-function-path or --custom-rm-path")
    if args.rollout_max_response_len is None:
        raise UsageError("--rollout-max-response-len is missing: how many tokens a response may have")
    shaped = args.custom_reward_post_process_path or not args.rewards_normalization
    if args.n_samples_per_prompt == 1 and args.advantage_estimator in ("grpo", "gspo", "cispo") and not shaped:
        raise UsageError("with --n-samples-per-prompt 1 every group-normalised advantage is 0: sample several")


def _check_top_p(args: Namespace) -> None:
    """slime replays what a token was drawn from in training; this trainer does not."""
    if args.rollout_top_p != 1.0 and not (args.debug_train_only or args.debug_rollout_only):
        raise UsageError("--rollout-top-p must be 1.0 in training: the trainer's log-probs are over all tokens")


def _check_sampling(args: Namespace) -> None:
    """By the engine's own rules: what it refuses would end the run at its first request, or at its first evaluation,
    which may be hours later."""
    if fault := _sampling_fault(rollout_sampling_params(args)):
        raise UsageError(f"--rollout-{_setting(fault).replace('_', '-')} {fault.told}")
    lines = [_evaluation_fault(args, dataset) for dataset in args.eval_datasets]
    if any(lines):
        raise UsageError("\n".join(filter(None, lines)))


def _evaluation_fault(args: Namespace, dataset: EvalDataset) -> str | None:
    where = f"--eval-config {args.eval_config}: data set {dataset.name!r}:"
    count = dataset.n_samples_per_eval_prompt
    if dataset.rm_type is not None:
        return f"{where} rm_type works under slime only (--host slime): here {REFUSED['--rm-type']}"
    if type(count) is not int or count < 1:
        return f"{where} n_samples_per_eval_prompt {str(count)[:40]} must be 1 or more"
    fault = _sampling_fault(eval_sampling_params(dataset))
    if fault is None:
        return None
    name = _setting(fault)
    if getattr(args, f"eval_{name}", None) == getattr(dataset, name):  # not the data set's own
        return f"--eval-{name.replace('_', '-')} {fault.told}"
    return f"{where} {name} {fault.told}"


def _sampling_fault(params: dict[str, Any]) -> ParameterError | None:
    try:
        SamplingParams.from_payload(params)
    except ParameterError as error:
        return error
    return None


def _setting(fault: ParameterError) -> str:
    """The run's name of a sampling parameter."""
    return "max_response_len" if fault.name == "max_new_tokens" else fault.name


# ---- Data ----------------------------------------------------------------------------------------------------


def _check_data(args: Namespace) -> None:
    if args.load_debug_rollout_data or not args.rollout_global_dataset:
        return
    if args.prompt_data is None:
        raise UsageError("--prompt-data is missing: the file with the prompts")
    sft = args.rollout_function_path == SFT_ROLLOUT
    controls = _control_tokens(Path(args.hf_checkpoint or "")) if sft else None
    for number, row in read_numbered_rows(args.prompt_data):
        where = f"--prompt-data {split_slice(args.prompt_data)[0]} line {number}"
        _check_row(where, row, args.input_key, "--input-key", args.label_key, args)
        if sft:
            _check_dialogue(where, row[args.input_key], controls)
    for dataset in args.eval_datasets:
        for number, row in read_numbered_rows(dataset.path):
            where = f"--eval-prompt-data {split_slice(dataset.path)[0]} line {number}"
            _check_row(where, row, dataset.input_key, "--eval-input-key", dataset.label_key, args)


def _check_row(where: str, row: dict[str, Any], key: str, flag: str, label_key: str | None, args: Namespace) -> None:
    if row.get(key) is None:
        raise UsageError(f"{where} has no {key!r}: choose with {flag} among {_keys(row)}")
    if label_key is not None and label_key not in row:
        raise UsageError(f"{where} has no {label_key!r} (the label key): it has {_keys(row)}")
    if not isinstance(row.get(args.metadata_key) or {}, dict):
        raise UsageError(f"{where}: {args.metadata_key!r} is not an object")
    if args.apply_chat_template and not isinstance(row[key], str | list):
        raise UsageError(f"{where}: {key!r} is neither text nor messages, so --apply-chat-template cannot render it")
    try:
        row_tools(row, args.tool_key)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _keys(row: dict[str, Any]) -> str:
    """The row's keys, on one line and no longer than a line."""
    return " ".join(", ".join(row).split())[:200] or "nothing"


def _control_tokens(folder: Path) -> re.Pattern | None:
    """Every token that the tokenizer has added to its vocabulary, as one pattern; None where there is none."""
    file = folder / "tokenizer.json"
    tokens = read_json_object(file).get("added_tokens") if file.is_file() else None
    texts = [token.get("content") for token in tokens or [] if isinstance(token, dict)]
    found = sorted((text for text in texts if isinstance(text, str) and text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _check_dialogue(where: str, messages: Any, controls: re.Pattern | None) -> None:
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UsageError(
            f"{where}: SFT needs a list of messages, each with a role, a text as content, and tool_calls with names"
        )
    for message in messages:
        if (
            controls
            and message["role"] in ("user", "tool")
            and (found := controls.search(message.get("content") or ""))
        ):
            raise UsageError(
                f"{where}: a {message['role']} message holds {found.group()!r}, which the template would turn into a "
                "control token: remove the row, or the text"
            )
    if not any(m["role"] == "assistant" and m.get("step_loss_mask", 1) == 1 for m in messages):
        raise UsageError(f"{where}: no assistant turn to train")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    calls = message.get("tool_calls") or []
    return isinstance(message.get("content"), str | None) and isinstance(calls, list) and all(map(_is_call, calls))


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


# ---- Model ---------------------------------------------------------------------------------------------------


def _same(given: Any, expected: Any) -> bool:
    """Equal values; converted checkpoints hold numbers such as 9.999999747e-06 for 1e-05."""
    if isinstance(given, float) or isinstance(expected, float):
        return math.isclose(given, expected, rel_tol=1e-6)
    return given == expected


def _check_model_shape(args: Namespace) -> None:
    """MODEL_ARGS against the HF config: only what was given, for both hosts."""
    path = Path(args.hf_checkpoint or "") / "config.json"
    if not path.is_file():
        return  # _check_folders says so
    config = read_json_object(path)
    dests = {flag.name: flag.dest for flag in load_flags()}
    lines = []
    for flag, key in MODEL_SHAPE.items():
        given = getattr(args, dests[flag])
        expected = _config_value(config, key)
        if flag == "--untie-embeddings-and-output-weights":
            expected = None if expected is None else not expected
        if flag in args.given_flags and expected is not None and not _same(given, expected):
            lines.append(
                f"{flag} {given} does not fit {args.hf_checkpoint}, whose {key} is {_config_value(config, key)}"
            )
    if lines:
        raise UsageError("\n".join(lines))


def _config_value(config: dict[str, Any], key: str) -> Any:
    if key == "rope_theta":
        return (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    return config.get(key)


# ---- Memory --------------------------------------------------------------------------------------------------


def _check_memory(args: Namespace) -> None:
    if not os.path.isdir(args.hf_checkpoint or ""):
        return  # _check_folders says so
    needed, free = memory_needed(args), memory_free()
    if free is not None and needed > free:
        raise UsageError(
            f"too little memory: training {args.hf_checkpoint} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free; freeze layers with --freeze-params-name-list or take a smaller model"
        )


def memory_needed(args: Namespace) -> float:
    """Bytes, estimated from the headers of the safetensors files: fp32 weights, a compute copy, gradients, moments."""
    weights = trained = 0
    for name, count in parameter_counts(Path(args.hf_checkpoint)):
        weights += count
        trained += count if _is_trained(args, megatron_name(name)) else 0
    training = 0 if args.debug_rollout_only else 4 * 3 * trained
    reference = 4 * trained if args.use_kl_loss or args.kl_coef else 0
    return 4 * weights + 2 * weights + training + reference + WORKING_MEMORY


def parameter_counts(folder: Path) -> Iterator[tuple[str, int]]:
    """(HF name, number of values) of every tensor in the folder's safetensors files."""
    for file in weight_files(folder):
        for name, tensor in read_safetensors_header(folder / file).items():
            yield name, math.prod(tensor["shape"])


def megatron_name(name: str) -> str:
    """The Megatron name that holds an HF tensor, as far as the freezing flags need it."""
    name = name.removeprefix("model.").replace("layers.", "decoder.layers.", 1)
    name = re.sub(r"self_attn\.[qkv]_proj\.", "self_attention.linear_qkv.", name)
    name = name.replace("self_attn.o_proj.", "self_attention.linear_proj.").replace("self_attn.", "self_attention.")
    name = re.sub(r"mlp\.(gate|up)_proj\.", "mlp.linear_fc1.", name).replace("mlp.down_proj.", "mlp.linear_fc2.")
    name = name.replace("embed_tokens.", "embedding.word_embeddings.").replace("lm_head.", "output_layer.")
    return name if name.startswith(("decoder.", "embedding.", "output_layer.")) else f"decoder.final_layernorm.{name}"


def _is_trained(args: Namespace, name: str) -> bool:
    if args.only_train_params_name_list:
        return any(re.search(pattern, name) for pattern in args.only_train_params_name_list)
    return not any(re.search(pattern, name) for pattern in args.freeze_params_name_list or [])


def memory_free() -> int | None:
    """Bytes that this process may still take: on the GPU where there is one, else here; None where unknown."""
    if os.path.exists("/dev/nvidia0"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.mem_get_info()[0]
    limits = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(limits) if limits else None


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available() -> int | None:
    """What a container's limit leaves, page cache that can go counted as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(limit) - used + int(stat.get("inactive_file", 0)) if limit.isdigit() else None


# ---- Port ----------------------------------------------------------------------------------------------------


def _check_server(args: Namespace) -> None:
    if args.sglang_server_concurrency > MAX_REQUESTS:
        raise UsageError(
            f"--sglang-server-concurrency {args.sglang_server_concurrency}: the server on this machine takes at most "
            f"{MAX_REQUESTS} requests at a time"
        )
    if ":" in (args.sglang_router_ip or ""):
        raise UsageError(
            f"--sglang-router-ip {args.sglang_router_ip}: the server on this machine has an IPv4 address or a name"
        )


def _check_port(args: Namespace) -> None:
    if args.sglang_router_port is None or args.debug_train_only or ":" in (args.sglang_router_ip or ""):
        return
    host = args.sglang_router_ip or "127.0.0.1"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, args.sglang_router_port))
        except OSError as error:
            raise UsageError(
                f"port {args.sglang_router_port} on {host} cannot be used ({error.strerror}): choose another with "
                "--sglang-router-port, or leave it out"
            ) from error


# ---- Plug-ins ------------------------------------------------------------------------------------------------


def _check_plugins(args: Namespace) -> None:
    _check_functions(args, plugin_paths(args))


def _check_plugins_for_slime(args: Namespace) -> None:
    """As above, without slime's own functions, which are not ours to find."""
    _check_functions(args, [(flag, path) for flag, path in plugin_paths(args) if not path.startswith("slime.")])


def _check_functions(args: Namespace, paths: list[tuple[str, str]]) -> None:
    lines, told = [], set()
    for flag, path in paths:
        try:
            module = load_function(path).__module__
            if (message := _ask_module(args, module)) and message not in told:
                told.add(message)  # plug-ins that read the same settings say the same
                lines.append(f"{flag} {module}: {message}")
        except UsageError as error:
            lines.append(f"{flag} {error}")
    if lines:
        raise UsageError("\n".join(lines))


def plugin_paths(args: Namespace) -> list[tuple[str, str]]:
    """(flag, dotted path) of every plug-in that the command names."""
    found = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in PLUGIN_FLAGS]
    found += [("--rollout-sample-hook-path", path) for path in args.rollout_sample_hook_path or []]
    for dataset in args.eval_datasets:
        found.append(("--eval-config custom_generate_function_path", dataset.custom_generate_function_path))
    return [(flag, path) for flag, path in found if path]


def _ask_module(args: Namespace, module_name: str) -> str | None:
    """A plug-in module may have a `check_args(args)` that raises, with a message for the user: that message."""
    ask = getattr(sys.modules[module_name], "check_args", None)
    return _answer(ask, args) if callable(ask) and not module_name.startswith("slime_local") else None


def _answer(ask: Callable[[Namespace], None], args: Namespace) -> str | None:
    try:
        ask(args)
    except Exception as error:  # whatever class the plug-in raises, its words are for the user
        return " ".join(str(error).split()) or type(error).__name__
    return None
