"""The full signature of a class whose constructors pass on `*args` and `**kwargs` to those of its bases."""

import inspect
from inspect import Parameter, Signature

_REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def whole_signature(kind: type, *, without: tuple[str, ...] = ()) -> Signature:
    """The signature of a class's constructor, with its bases' parameters in place of `*args` and `**kwargs`.

    without: parameters of a base that a class in between sets itself.
    """
    parameters_by_name: dict[str, Parameter] = {}
    takes_positions = True
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in _REST and parameter.name not in (*parameters_by_name, *without):
                by_name = parameter if takes_positions else parameter.replace(kind=Parameter.KEYWORD_ONLY)
                parameters_by_name[parameter.name] = by_name
        kinds = {parameter.kind for parameter in parameters}
        takes_positions = takes_positions and Parameter.VAR_POSITIONAL in kinds
        if Parameter.VAR_KEYWORD not in kinds:
            break
    return Signature(sorted(parameters_by_name.values(), key=lambda parameter: parameter.kind))
