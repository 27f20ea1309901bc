"""The checker behind jaxtyping's hook: beartype, with an int accepted where a float is declared, as in PEP 484."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
