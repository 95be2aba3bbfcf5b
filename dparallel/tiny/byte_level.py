"""A checkpoint to try everything with, without a download: random weights, bytes as tokens, a chat template.

    python -m dparallel.tiny.byte_level FOLDER

Its tokenizer encodes every text without loss, so it can be asked the problems of any benchmark. Its responses
are random bytes.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dparallel.config.base import UserError
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import save_model
from dparallel.stages.streams import set_encodings

LLADA = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message.role }}{{ '<|end_header_id|>\n\n' }}{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llada": LLADA, "dream": QWEN}  # by the models that have them
SPECIAL = {
    LLADA: ("<|startoftext|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    QWEN: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")
MASK, EOS = "<|mask|>", "<|endoftext|>"
LONGEST = 16_384  # tokens of prompt and response; few-shot prompts have some thousand bytes


def byte_level(template: str = LLADA) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and the special tokens of a template: `LLADA` or `QWEN`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL[template], MASK])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[template][0],
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> DiffusionTransformer:
    """A small model with random weights, whose predictions are far from uniform."""
    torch.manual_seed(seed)
    ids = tokenizer.get_vocab()
    ends = [ids[token] for token in (EOS, *END_OF_TURN) if token in ids]
    return DiffusionTransformer(
        DiffusionConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LONGEST,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            initializer_range=0.3,
        )
    ).eval()


def save_checkpoint(folder: str | Path, template: str = LLADA, seed: int = 0) -> None:
    """Save a random model with its byte-level tokenizer.

    Raises:
        UserError: the folder cannot be written, or holds another checkpoint.
    """
    tokenizer = byte_level(template)
    save_model(random_model(tokenizer, seed), folder, tokenizer=tokenizer)


def main() -> int:
    set_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m dparallel.tiny.byte_level",
        description="Make a tiny checkpoint with random weights, bytes as tokens, and a chat template.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write it")
    parser.add_argument(
        "--template", choices=[*TEMPLATES], default="llada", help="whose chat template (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    try:
        save_checkpoint(options.folder, TEMPLATES[options.template], options.seed)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
