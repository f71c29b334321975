"""How byte-level BPE splits a text before its merges, by llama.cpp's names for it."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_LIKE_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}*{_SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{_BIG}+{_SMALL}*%s|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

Splits = tuple[tuple[str, ...], bool]
"""What splits a text, one after the other; whether a whole word that is a token stays."""
SPLITS: dict[Splits, tuple[str, ...]] = {
    ((GPT2,), False): ("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "a.x-4.0", "mellum", "trillion", "exaone4"),
    ((DIGIT, GPT2), False): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ((_LIKE_GPT4 % "",), False): ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"),
    ((_LIKE_GPT4 % "{1,3}",), False): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    ((_LIKE_GPT4 % "{1,3}",), True): ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
    ((_CASED % ("", "") + r"\p{N}|" + _REST,), True): ("tekken",),
    ((_CASED % (_SHORT, _SHORT) + r"\p{N}{1,3}|" + _REST,), False): ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
}
"""The names, the first of them the one that is written."""
BEGINNING = [name for (_, whole), names in SPLITS.items() if whole for name in names]
"""Of these llama.cpp begins texts with the token for that unless a file says otherwise."""


def split_as(tokenizer: Tokenizer, name: str) -> bool:
    """Have a byte-level BPE split texts as llama.cpp does by this name; whether the name is known."""
    found = next((splits for splits, names in SPLITS.items() if name in names), None)
    if found is None:
        return False
    patterns, tokenizer.model.ignore_merges = found
    parts = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in patterns
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return True
