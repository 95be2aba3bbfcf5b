"""Word-level `transformers` tokenizers of the embedded tasks."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dparallel.problems.embedded import EOS, MASK, PAD, UNKNOWN, embedded_task


def build_tokenizer(task: str = "coins") -> PreTrainedTokenizerFast:
    """One token per word of an embedded task; `<unk>` for all other words."""
    vocabulary = {word: index for index, word in enumerate(embedded_task(task).vocabulary)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        mask_token=MASK,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
