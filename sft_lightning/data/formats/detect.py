"""Choose a built-in template by the keys of a row or by name."""

from sft_lightning.data.formats.base import Template
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.errors import UserError


def template_for(keys: set[str]) -> Template:
    """Returns the template that ``auto`` chooses for a file whose rows have these keys.

    Raises:
        UserError: If no template fits; the message lists the keys found and the mapping to set.
    """
    for template in (Plain, R1Zero):
        if set(template.required_keys) <= keys:
            return template()
    raise UserError(
        f"found the keys {sorted(keys)}, expected 'prompt' and 'response' or 'question' and 'answer'; "
        "map other names with data.columns, for example {prompt: instruction, response: output}"
    )


def template_named(name: str) -> Template:
    """Returns a new built-in template by its class name.

    Raises:
        UserError: If there is no such template.
    """
    for template in (Plain, R1Zero):
        if template.__name__ == name:
            return template()
    raise UserError(f"template '{name}' is unknown; choose auto, Plain or R1Zero")
