#!/bin/bash
# Makes the image that `fusewire demo` mounts. The same tree every time, and with the same mksquashfs the same bytes:
# owners, times, order and compressor are fixed. gzip, because Python's standard library can unpack it everywhere.
# Usage: scripts/make_demo_image.sh [OUTPUT]       (needs mksquashfs of squashfs-tools 4.4 or newer)
set -euo pipefail
umask 022
cd "$(dirname "$(readlink -f "$0")")/.."
output=$(realpath -m "${1:-src/fusewire/data/demo.sqsh}")
command -v mksquashfs >/dev/null || { echo "mksquashfs is missing (apt-get install squashfs-tools)" >&2; exit 1; }
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"

cat >"$tree/README" <<'END'
You are reading a file inside a squashfs image. Nothing was unpacked to disk:
a process of yours answers the kernel's questions about this tree, over
/dev/fuse, and no root and no set-user-ID program had a part in it.

  bin/hello      a program that runs from inside the image
  docs/          a directory, with a file that is stored in several blocks
  docs/README    a hard link to this text
  latest         a symbolic link to this text
END
mkdir "$tree/bin" "$tree/docs"
cat >"$tree/bin/hello" <<'END'
#!/bin/sh
# Says where it runs. In the demo that is a directory which exists for this one command only.
here=$(dirname "$0")
echo "hello from $0, user $(id -u)"
echo "beside me: $(cd "$here/.." && echo *)"
END
chmod 755 "$tree/bin/hello"
for number in $(seq 1 400); do
    echo "line $number of a text that is longer than one block of this image"
done >"$tree/docs/blocks.txt"
ln "$tree/README" "$tree/docs/README"
ln -s README "$tree/latest"

rm -f "$output"
# mksquashfs takes its times from SOURCE_DATE_EPOCH or from options, and refuses both at once.
env -u SOURCE_DATE_EPOCH mksquashfs "$tree" "$output" -comp gzip -b 4096 -noappend -no-progress -quiet \
    -all-root -all-time 1767225600 -mkfs-time 1767225600 -no-xattrs -processors 1
chmod 644 "$output"
