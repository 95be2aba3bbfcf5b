"""A byte-level tokenizer, which encodes every text without loss, with the published chat templates."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

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
SPECIAL = {
    LLADA: ("<|startoftext|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    QWEN: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and the special tokens of a template: `LLADA` or `QWEN`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL[template]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[template][0],
        eos_token="<|endoftext|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
