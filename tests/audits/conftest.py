"""As the models' own tests: a model whose every part matters."""

from tests.models.conftest import lively

__all__ = ["lively"]
