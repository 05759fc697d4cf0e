"""Names that users give to what kinds do; the options of the command line load nothing else."""

__all__ = ["PROMPTS"]

PROMPTS = ("auto", "chat", "plain")
"""How a base model is prompted: `chat` by its template, `plain` by the text alone; `auto` is chat
if the tokenizer has a template."""
