import functools

from sft_lightning import TokenLoss
from sft_lightning.system.identity import identity, public_name


def test_exported_names_are_short_and_others_have_their_module():
    assert public_name(TokenLoss) == "sft_lightning.TokenLoss"
    assert public_name(functools.partial) == "functools.partial"


def test_an_identity_names_the_class_and_its_public_attributes():
    class Loss:
        def __init__(self):
            self.names = {"b", "a"}
            self._cache = object()

    assert identity(TokenLoss()) == "sft_lightning.TokenLoss()"
    assert identity(Loss()).endswith(".Loss(names=set('a', 'b'))")
