"""What is in a repaired wheel: size, manylinux tag, shared libraries that it needs.

    python bench/wheel_contents.py WHEEL...

Fails if a wheel needs more than the C and C++ runtimes and OpenMP, all of which torch needs too:
no libtorch (one wheel serves every torch), no libcudart or libcuda (it imports without a driver).
"""

import io
import platform
import sys
from pathlib import Path
from zipfile import ZipFile

from elftools.elf.elffile import ELFFile

SYSTEM = {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
ALLOWED = SYSTEM | {"libgomp", "libstdc++", "libgcc_s"}


def needed(module: bytes) -> list[str]:
    """Returns the names of the shared libraries that a compiled module loads."""
    dynamic = ELFFile(io.BytesIO(module)).get_section_by_name(".dynamic")
    return sorted(tag.needed for tag in dynamic.iter_tags("DT_NEEDED"))


def inspect(wheel: Path) -> None:
    """Prints what a wheel holds; raises if it needs what it must not."""
    with ZipFile(wheel) as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        modules = [name for name in sizes if ".so" in Path(name).suffixes]
        libraries = {name: needed(archive.read(name)) for name in modules}
    print(wheel.name)
    print(f"{wheel.stat().st_size:,} bytes; {sum(sizes.values()):,} unpacked, {len(sizes)} files")
    for name, names in libraries.items():
        print(f"{name}: {sizes[name]:,} bytes, needs {', '.join(names)}")
        foreign = [each for each in names if each.partition(".so")[0] not in ALLOWED]
        if foreign:
            raise SystemExit(f"{name}: must need nothing but {sorted(ALLOWED)}, got {foreign}")
    if len(modules) != 1:
        raise SystemExit(f"{wheel.name}: must hold one compiled module, got {modules}")
    print(
        f"tag {wheel.stem.rpartition('-')[2]}: built with glibc {platform.libc_ver()[1]} here; "
        "released wheels are built in manylinux_2_28 by cibuildwheel"
    )


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        inspect(path)
