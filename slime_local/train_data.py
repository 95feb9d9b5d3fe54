"""From samples to what the trainer reads: reward post-processing, slime's training-data keys, and the debug files."""

from pathlib import Path
from typing import Any

from slime_local.errors import UsageError, one_line
from slime_local.generate import known_reward
from slime_local.plugins import load_function, may_end_job
from slime_local.sample import Sample

GROUP_NORMALISED = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
STD_NORMALISED = ("grpo", "gspo", "cispo")


def flatten(groups: list[Any]) -> list[Sample]:
    """All samples of a rollout in order. Siblings cut out of one episode must share a rollout_id."""
    samples: list[Sample] = []
    for item in groups:
        samples += [item] if isinstance(item, Sample) else _flatten_group(item)
    return samples


def _flatten_group(group: list[Any]) -> list[Sample]:
    samples: list[Sample] = []
    for item in group:
        siblings = item if isinstance(item, list) else [item]
        ids = {sample.rollout_id for sample in siblings}
        if len(siblings) > 1 and (len(ids) > 1 or None in ids):
            raise UsageError("the generate function split an episode into samples without one rollout_id for all")
        samples += siblings
    return samples


def post_process_rewards(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """(raw rewards, training rewards), by the plug-in or normalised within each group.

    A group is the samples of one `group_index`, whatever their number.
    """
    if args.custom_reward_post_process_path:
        path = args.custom_reward_post_process_path
        with may_end_job(path):
            return load_function(path)(args, samples)
    raw = [known_reward(sample.get_reward_value(args), sample) for sample in samples]
    if args.advantage_estimator not in GROUP_NORMALISED or not args.rewards_normalization:
        return raw, raw
    use_std = args.advantage_estimator in STD_NORMALISED and args.grpo_std_normalization
    return raw, _normalise_groups(raw, [sample.group_index for sample in samples], use_std)


def _normalise_groups(raw: list[float], group_of: list[Any], use_std: bool) -> list[float]:
    import torch

    rewards = torch.tensor(raw, dtype=torch.float32)
    for group in set(group_of):
        members = [i for i, other in enumerate(group_of) if other == group]
        centred = rewards[members] - rewards[members].mean()
        std = centred.std() if use_std and len(members) > 1 else 1.0
        rewards[members] = centred / (std + 1e-6) if use_std else centred
    return rewards.tolist()


def convert_samples_to_train_data(args: Any, samples: list[Sample]) -> dict[str, list[Any]]:
    """What the trainer reads, one entry a sample, under slime's keys. Samples to remove get a mask of zeros."""
    if args.custom_convert_samples_to_train_data_path:
        return load_function(args.custom_convert_samples_to_train_data_path)(args, samples)
    raw, rewards = post_process_rewards(args, samples)
    if not len(raw) == len(rewards) == len(samples):
        raise UsageError(f"{len(samples)} samples came back from reward post-processing with {len(rewards)} rewards")
    masks = [_loss_mask(sample) for sample in samples]
    data = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": _logged_rewards(samples, raw),
        "truncated": [int(sample.status is Sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "group_indices": [sample.group_index for sample in samples],
        "rollout_ids": _rollout_ids(samples),
        "loss_masks": masks,
    }
    return data | _optional_train_data(samples)


def _optional_train_data(samples: list[Sample]) -> dict[str, list[Any]]:
    data = {}
    log_probs = [sample.rollout_log_probs for sample in samples]
    if any(values is not None for values in log_probs):
        data["rollout_log_probs"] = log_probs
    if any(sample.train_metadata is not None for sample in samples):
        data["metadata"] = [sample.train_metadata for sample in samples]
    if "round_number" in (samples[0].metadata or {}):
        data["round_number"] = [sample.metadata["round_number"] for sample in samples]
    return data


def _loss_mask(sample: Sample) -> list[int]:
    if sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    if len(sample.loss_mask) != sample.response_length:
        raise UsageError(
            f"sample {sample.index}: loss_mask has {len(sample.loss_mask)} entries for a response of "
            f"{sample.response_length} tokens"
        )
    if sample.remove_sample:
        sample.loss_mask = [0] * sample.response_length
    return sample.loss_mask


def _logged_rewards(samples: list[Sample], raw: list[Any]) -> list[Any]:
    """metadata["raw_reward"] stands in for the raw reward in the log."""
    return [(sample.metadata or {}).get("raw_reward", reward) for sample, reward in zip(samples, raw, strict=True)]


def _rollout_ids(samples: list[Sample]) -> list[int]:
    """Each sample's rollout_id; samples without one get the smallest numbers that no other has."""
    taken = {sample.rollout_id for sample in samples}
    free = iter(i for i in range(len(samples) + len(taken)) if i not in taken)
    return [next(free) if sample.rollout_id is None else sample.rollout_id for sample in samples]


# ---- Debug files ---------------------------------------------------------------------------------------------


def save_debug_samples(template: str, rollout_id: int | str, samples: list[Sample]) -> Path:
    """Write the samples as plain dicts, so that the file loads without unpickling classes."""
    return save_plain(template, rollout_id, {"samples": [sample.to_dict() for sample in samples]})


def save_plain(template: str, rollout_id: int | str, value: dict[str, Any]) -> Path:
    """torch.save `value` to the file that the template names, in one move."""
    import torch

    path = Path(template.format(rollout_id=rollout_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        torch.save({"rollout_id": rollout_id, **value}, partial)
    except RuntimeError as error:  # its words for a full disk
        raise OSError(f"{partial}: {str(error).splitlines()[0]}") from error
    partial.replace(path)
    return path


def load_debug_samples(template: str, rollout_id: int, share: float | None = None) -> list[Sample]:
    """The samples of such a file; with `share` that part of them, half from its start and half from its end."""
    import torch

    path = Path(template.format(rollout_id=rollout_id))
    if not path.is_file():
        raise UsageError(f"--load-debug-rollout-data: no file {path}")
    try:
        samples = [Sample.from_dict(row) for row in torch.load(path, weights_only=True)["samples"]]
    except Exception as error:  # the file's bytes decide what torch raises
        raise UsageError(f"--load-debug-rollout-data {path} is not a rollout's samples: {one_line(error)}") from error
    if share is not None:
        count = int(len(samples) * share)
        samples = samples[: count // 2] + samples[len(samples) - (count - count // 2) :]
    return samples
