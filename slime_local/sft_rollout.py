"""The rollout of supervised fine-tuning: no generation, the row's dialogue is the response.

--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss
"""

from functools import cache
from typing import Any

from slime_local.data import load_tokenizer
from slime_local.errors import UsageError, one_line
from slime_local.masks import LossMasker, response_length
from slime_local.sample import Sample


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[list[Sample]]:
    """--rollout-batch-size groups of one sample, tokens and loss mask set, reward 0.

    Raises UsageError when a dialogue holds nothing to train.
    """
    if evaluation:
        raise UsageError("SFT has no evaluation rollout: give --eval-function-path, or evaluate the saved model")
    masker = _masker(args.hf_checkpoint, args.loss_mask_type)
    groups = data_source.get_samples(args.rollout_batch_size)
    for (sample,) in groups:
        _fill(sample, masker)
    return groups


@cache
def _masker(path: str, kind: str) -> LossMasker:
    return LossMasker(load_tokenizer(path), kind)


def _fill(sample: Sample, masker: LossMasker) -> None:
    try:
        ids, mask = masker.mask(sample.prompt, tools=sample.metadata.get("tools"))
    except Exception as error:  # the template decides what it raises
        raise UsageError(
            f"dialogue {sample.index} cannot be rendered by the chat template: {one_line(error)}"
        ) from error
    length = response_length(mask)
    if length == 0:
        raise UsageError(f"dialogue {sample.index} has no assistant turn to train")
    sample.tokens = ids
    sample.response_length = length
    sample.loss_mask = mask[-length:]
    sample.reward = 0
    sample.status = Sample.Status.COMPLETED
