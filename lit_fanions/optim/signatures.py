"""The declared options as the signature and docstring of a constructor.

Beside ``options``, which declares them: this is what makes ``help``, editors and jsonargparse see
``**options`` as the arguments that they are.
"""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Callable

from lit_fanions.optim.options import FIELDS, GroupOptions


def argument_docs(indent: str = "    ") -> str:
    """Return the options as entries of the Args section of a docstring."""
    lines = []
    for f in FIELDS:
        text = f"{f.name}: {f.metadata['help']}"
        wrapped = textwrap.wrap(text, 100 - len(indent) - 4)
        lines += [f"{indent}    {wrapped[0]}", *(f"{indent}        {line}" for line in wrapped[1:])]
    return "\n".join(lines)


GroupOptions.__doc__ = f"{GroupOptions.__doc__}\n\n    Args:\n{argument_docs()}\n    "


def takes_options(init: Callable[..., None]) -> Callable[..., None]:
    """Give a constructor with ``**options`` the signature that the declared options make."""
    types = typing.get_type_hints(GroupOptions)
    own = [
        parameter
        for parameter in inspect.signature(init).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    taken = {parameter.name for parameter in own}
    more = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=types[f.name]
        )
        for f in FIELDS
        if f.name not in taken
    ]
    init.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return init
