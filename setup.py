"""What pyproject.toml cannot say: a wheel carries the recipes and launch configurations that stand beside the package.

In a checkout they are files a person reads and edits; in a wheel they lie in ``training_ready/_shipped``.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {
    "recipes": ("*.yaml", "*.json"),
    "accelerate_configs": ("*.yaml",),
    "deepspeed_configs": ("*.json",),
}


class BuildWithRecipes(build_py):
    """Copies the shipped folders into the built package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, patterns in SHIPPED.items():
            files = sorted(path for pattern in patterns for path in (ROOT / folder).glob(pattern))
            if not files:
                raise FileNotFoundError(
                    f"{ROOT / folder} holds none of {patterns}; the source tree is incomplete"
                )
            target = Path(self.build_lib, "training_ready", "_shipped", folder)
            target.mkdir(parents=True, exist_ok=True)
            for path in files:
                self.copy_file(str(path), str(target / path.name))


setup(cmdclass={"build_py": BuildWithRecipes})
