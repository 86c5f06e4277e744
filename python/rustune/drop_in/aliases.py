"""How names are taken and given back: proxies over installed modules, stand-ins for absent ones, and their finder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

from rustune.drop_in.names import ALWAYS, PROXIED, STAND_INS, Names

# Read once, at import, by a library that must go on working after `uninstall`: it is told what is really installed.
_TOLD_THE_TRUTH: Final = "datasets.config"

_lock: Final = threading.RLock()
_replaced: Final[dict[str, ModuleType | None]] = {}  # what stood under each name; None: nothing did


class Alias(ModuleType):
    """A module of ours under another's name; `datasets` may pickle it by that name."""

    def __init__(self, name: str, names: Names, said: str) -> None:
        super().__init__(name, said)
        self.__dict__["_rustune_names"] = names

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _module_named, (self.__name__,)


class Proxy(Alias):
    """Hands everything on to an installed module, except our names.

    The module is imported when something of it is first asked for. Attributes are set on the module itself, as an
    import of a submodule does; ours are kept here.
    """

    def __init__(self, name: str, names: Names, real: ModuleType | None, spec: ModuleSpec | None) -> None:
        super().__init__(name, names, f"{name} with the names that rustune answers")
        self.__dict__["_rustune_real"] = None
        if real is not None:
            self._adopt(real)
        elif spec is not None:
            self.__dict__.update(__spec__=spec, __loader__=spec.loader, __file__=spec.origin, __package__=spec.name)
            if spec.submodule_search_locations is not None:
                self.__dict__["__path__"] = spec.submodule_search_locations

    def __getattr__(self, name: str) -> Any:
        if name in self._rustune_names and self._answers():
            return _object(self._rustune_names[name])
        real = self.__dict__["_rustune_real"]
        if real is None and name.startswith("__") and name not in ("__all__", "__version__"):
            # Who walks over all modules asks for such names, and should not load this one.
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_load(self) if real is None else real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._rustune_names:
            self.__dict__[name] = value
        else:
            setattr(_load(self), name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(_load(self), name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(_load(self)), *self._rustune_names})

    def __repr__(self) -> str:
        return f"<module {self.__name__!r} with rustune's names>"

    def _answers(self) -> bool:
        # A machine with CUDA answers for its own devices.
        return self.__name__ != "torch.cuda" or not _load(self).is_available()

    def _adopt(self, real: ModuleType) -> None:
        self.__dict__["_rustune_real"] = real
        for name in ("__doc__", "__spec__", "__loader__", "__file__", "__package__", "__path__"):
            if name in real.__dict__ or hasattr(real, name):
                self.__dict__[name] = getattr(real, name)


class StandIn(Alias):
    """Takes the name of a module that is absent, with the few names that are asked for."""

    def __init__(self, name: str, names: Names, said: str) -> None:
        super().__init__(name, names, said)
        spec = ModuleSpec(name, _StandInLoader(), origin="rustune.drop_in", is_package=True)
        self.__dict__.update(__spec__=spec, __loader__=spec.loader, __package__=name, __path__=[])

    def __getattr__(self, name: str) -> Any:
        if name in self._rustune_names:
            return _object(self._rustune_names[name])
        below = sys.modules.get(f"{self.__name__}.{name}")
        if below is not None:
            return below
        raise AttributeError(self.lacks(name), name=name, obj=self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._rustune_names})

    def __repr__(self) -> str:
        return f"<module {self.__name__!r}: {self.__doc__}>"

    def lacks(self, name: str) -> str:
        """Says that a name is not there.

        Args:
            name: The name.

        Returns:
            A line.
        """
        return f"{self.__name__}.{name} is not there: {self.__doc__}"


class _StandInLoader(Loader):
    """The loader that a stand-in's spec names; there is nothing to load."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return sys.modules.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing."""


class _Finder(MetaPathFinder):
    """Says what a stand-in lacks, where an import would say no more than "cannot import name"."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Looks for nothing of its own.

        Args:
            fullname: The module asked for.
            path: Where its package looks for modules.
            target: Makes no difference.

        Returns:
            None, or the spec of the one library that is told what is really installed.

        Raises:
            ModuleNotFoundError: For a module below a stand-in. It names no module, so that `from ... import` shows it.
        """
        parent, _, name = fullname.rpartition(".")
        owner = sys.modules.get(parent)
        if isinstance(owner, StandIn):
            raise ModuleNotFoundError(owner.lacks(name))
        if isinstance(owner, Proxy) and owner.__dict__["_rustune_real"] is None:
            # A package is imported before what is below it, which it may import itself.
            _load(owner)
            if fullname in sys.modules:
                return _LoadedLoader.spec_of(sys.modules[fullname])
        if fullname == _TOLD_THE_TRUTH:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _TruthfulLoader(spec.loader)
            return spec
        return None


class _LoadedLoader(Loader):
    """Gives a module that is there already, as it is; an import that has begun would run it once more."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.spec = module.__spec__

    @classmethod
    def spec_of(cls, module: ModuleType) -> ModuleSpec:
        """Makes a spec with such a loader, and puts it into the module until it is "loaded": the import looks there.

        Args:
            module: The module.

        Returns:
            The spec.
        """
        spec = ModuleSpec(module.__name__, cls(module))
        module.__spec__ = spec
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _TruthfulLoader(Loader):
    """Loads a module while the stand-ins for absent packages are out of sight."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with _out_of_sight():
            self.loader.exec_module(module)


_finder: Final = _Finder()


def install() -> None:
    """Takes the names, unless they are taken already."""
    with _lock:
        if _replaced:
            return
        made: dict[str, ModuleType] = {}
        for name, names in ALWAYS.items():
            made[name] = StandIn(name, names, f"rustune answers for {_top(name)}, with what notebooks use of it")
        for top in dict.fromkeys(_top(name) for name in PROXIED):
            made |= _proxies(top) if _is_installed(top) else _stand_ins(top)
        for name, module in made.items():
            _replaced[name] = sys.modules.get(name)
            sys.modules[name] = module
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Gives the names back, to the modules that had them or that were imported behind a proxy."""
    with _lock:
        for name, before in _replaced.items():
            module = sys.modules.get(name)
            real = module.__dict__.get("_rustune_real") if isinstance(module, Proxy) else before
            if isinstance(module, Alias):
                if real is not None:
                    sys.modules[name] = real
                else:
                    del sys.modules[name]
        _replaced.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


def _proxies(top: str) -> dict[str, ModuleType]:
    """Proxies for an installed package; what is not imported yet stays so until it is asked for."""
    made: dict[str, ModuleType] = {}
    for name in (name for name in PROXIED if _top(name) == top):
        spec = None
        if sys.modules.get(top) is None:
            # The spec of a submodule cannot be had without importing its package.
            spec = importlib.util.find_spec(name) if name == top else ModuleSpec(name, None, is_package=True)
        made[name] = Proxy(name, PROXIED[name], sys.modules.get(name), spec)
    return made


def _stand_ins(top: str) -> dict[str, ModuleType]:
    """Stand-ins for an absent package and its modules."""
    said = f"{top} is not installed; rustune stands in for it with what notebooks use of it"
    names = [name for name in dict.fromkeys([*PROXIED, *STAND_INS]) if _top(name) == top]
    return {name: StandIn(name, {**PROXIED.get(name, {}), **STAND_INS.get(name, {})}, said) for name in names}


def _load(proxy: Proxy) -> ModuleType:
    """The module behind a proxy, imported if need be, with the proxies of its package out of the way meanwhile."""
    with _lock:
        real = proxy.__dict__["_rustune_real"]
        if real is None:
            top = _top(proxy.__name__)
            family = {name: module for name, module in sys.modules.items() if _top(name) == top}
            proxies = {name: module for name, module in family.items() if isinstance(module, Proxy)}
            for name in proxies:
                del sys.modules[name]
            try:
                for name, module in proxies.items():
                    importlib.import_module(name)
                    # Some modules put another in their place while they are imported.
                    module._adopt(sys.modules[name])
            finally:
                sys.modules.update(proxies)
            real = proxy.__dict__["_rustune_real"]
        return real  # type: ignore[no-any-return]


@contextmanager
def _out_of_sight() -> Iterator[None]:
    """Takes the stand-ins for absent packages out of `sys.modules` for a while."""
    with _lock:
        hidden = {
            name: module
            for name, module in sys.modules.items()
            if isinstance(module, StandIn) and _top(name) not in {_top(ours) for ours in ALWAYS}
        }
        for name in hidden:
            del sys.modules[name]
        try:
            yield
        finally:
            sys.modules.update(hidden)


def _is_installed(top: str) -> bool:
    """Whether a package is there, without importing it."""
    return sys.modules.get(top) is not None or importlib.util.find_spec(top) is not None


def _object(reference: str) -> Any:
    """What `module:attribute` means; `module:` is the module."""
    module_name, _, attribute = reference.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def _module_named(name: str) -> Any:
    """The module of a pickle."""
    return importlib.import_module(name)


def _top(name: str) -> str:
    return name.partition(".")[0]


def replaced() -> Mapping[str, ModuleType | None]:
    """Returns the names taken at the moment, with the modules that had them."""
    return dict(_replaced)
