"""A word-level `transformers` tokenizer for the coins task."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dparallel.problems import coins


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the task; `<unk>` for all other words."""
    vocabulary = {word: index for index, word in enumerate(coins.WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=coins.UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=coins.PAD,
        unk_token=coins.UNKNOWN,
        mask_token=coins.MASK,
        eos_token=coins.EOS,
        clean_up_tokenization_spaces=False,
    )
