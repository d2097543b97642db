"""Rewards that ship with rlpost, one a file; README.md shows how to write your own."""

QUICK = frozenset(
    {
        *("boxed_answer", "exact_answer", "exact_chain", "final_number", "marked_answer", "choice_letter"),
        *("format_tags", "language", "repetition"),
        *("length_budget", "length_cosine", "length_kimi", "length_overlong"),
    }
)
"""Pure, and linear in the length of an answer: they run in the trainer's process, where a call costs the least."""
