"""Layouts of the FUSE structs and the opcode table: one row per opcode drives decoding, dispatch and encoding.

Layer `wire`: no I/O. A layout is written once, as C field names with `struct` codes; the decoder's format and the
compiled test against <linux/fuse.h> both come from it. Byte order is the host's, as the kernel's is ("=": standard
sizes, no implicit padding; the header pads every struct by hand).
"""

from __future__ import annotations

from struct import Struct, calcsize
from typing import NamedTuple

from fusewire.wire import abi

_ATTR = (
    "ino:Q size:Q blocks:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I ctimensec:I "
    "mode:I nlink:I uid:I gid:I rdev:I blksize:I flags:I"
)

_STATX = (
    "mask:I blksize:I attributes:Q nlink:I uid:I gid:I mode:H ___spare0:2s ino:Q size:Q blocks:Q attributes_mask:Q "
    "atime.tv_sec:q atime.tv_nsec:I _atime.__reserved:i btime.tv_sec:q btime.tv_nsec:I _btime.__reserved:i "
    "ctime.tv_sec:q ctime.tv_nsec:I _ctime.__reserved:i mtime.tv_sec:q mtime.tv_nsec:I _mtime.__reserved:i "
    "rdev_major:I rdev_minor:I dev_major:I dev_minor:I ___spare2:112s"
)


def _embed(member: str, fields: str) -> str:
    return " ".join(f"_{member}.{f[1:]}" if f.startswith("_") else f"{member}.{f}" for f in fields.split())


# C struct -> its fields in order. A field named with a leading underscore is padding: encoded as zeros, skipped when
# decoding. "attr.", "lk.", "st." and "stat." prefixes are members of an embedded struct.
LAYOUTS: dict[str, str] = {
    "fuse_in_header": "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H _padding:H",
    "fuse_out_header": "len:I error:i unique:Q",
    "fuse_attr": _ATTR,
    "fuse_entry_out": "nodeid:Q generation:Q entry_valid:Q attr_valid:Q entry_valid_nsec:I attr_valid_nsec:I "
    + _embed("attr", _ATTR),
    "fuse_attr_out": "attr_valid:Q attr_valid_nsec:I _dummy:I " + _embed("attr", _ATTR),
    "fuse_statx_in": "getattr_flags:I _reserved:I fh:Q sx_flags:I sx_mask:I",
    "fuse_sx_time": "tv_sec:q tv_nsec:I ___reserved:i",
    "fuse_statx": _STATX,
    "fuse_statx_out": "attr_valid:Q attr_valid_nsec:I flags:I _spare:16s " + _embed("stat", _STATX),
    "fuse_kstatfs": "blocks:Q bfree:Q bavail:Q files:Q ffree:Q bsize:I namelen:I frsize:I _padding:I _spare:24s",
    "fuse_file_lock": "start:Q end:Q type:I pid:I",
    "fuse_forget_in": "nlookup:Q",
    "fuse_forget_one": "nodeid:Q nlookup:Q",
    "fuse_batch_forget_in": "count:I _dummy:I",
    "fuse_getattr_in": "getattr_flags:I _dummy:I fh:Q",
    "fuse_setattr_in": "valid:I _padding:I fh:Q size:Q lock_owner:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I "
    "ctimensec:I mode:I _unused4:I uid:I gid:I _unused5:I",
    "fuse_mknod_in": "mode:I rdev:I umask:I _padding:I",
    "fuse_mkdir_in": "mode:I umask:I",
    "fuse_rename_in": "newdir:Q",
    "fuse_rename2_in": "newdir:Q flags:I _padding:I",
    "fuse_link_in": "oldnodeid:Q",
    "fuse_open_in": "flags:I open_flags:I",
    "fuse_create_in": "flags:I mode:I umask:I open_flags:I",
    "fuse_open_out": "fh:Q open_flags:I backing_id:i",
    "fuse_release_in": "fh:Q flags:I release_flags:I lock_owner:Q",
    "fuse_flush_in": "fh:Q _unused:I _padding:I lock_owner:Q",
    "fuse_read_in": "fh:Q offset:Q size:I read_flags:I lock_owner:Q flags:I _padding:I",
    "fuse_write_in": "fh:Q offset:Q size:I write_flags:I lock_owner:Q flags:I _padding:I",
    "fuse_write_out": "size:I _padding:I",
    "fuse_fsync_in": "fh:Q fsync_flags:I _padding:I",
    "fuse_setxattr_in": "size:I flags:I setxattr_flags:I _padding:I",
    "fuse_getxattr_in": "size:I _padding:I",
    "fuse_getxattr_out": "size:I _padding:I",
    "fuse_lk_in": "fh:Q owner:Q lk.start:Q lk.end:Q lk.type:I lk.pid:I lk_flags:I _padding:I",
    "fuse_lk_out": "lk.start:Q lk.end:Q lk.type:I lk.pid:I",
    "fuse_access_in": "mask:I _padding:I",
    "fuse_init_in": "major:I minor:I max_readahead:I flags:I flags2:I _unused:44s",
    "fuse_init_out": "major:I minor:I max_readahead:I flags:I max_background:H congestion_threshold:H max_write:I "
    "time_gran:I max_pages:H map_alignment:H flags2:I max_stack_depth:I request_timeout:H _unused:22s",
    "fuse_interrupt_in": "unique:Q",
    "fuse_bmap_in": "block:Q blocksize:I _padding:I",
    "fuse_bmap_out": "block:Q",
    "fuse_ioctl_in": "fh:Q flags:I cmd:I arg:Q in_size:I out_size:I",
    "fuse_ioctl_iovec": "base:Q len:Q",
    "fuse_ioctl_out": "result:i flags:I in_iovs:I out_iovs:I",
    "fuse_poll_in": "fh:Q kh:Q flags:I events:I",
    "fuse_poll_out": "revents:I _padding:I",
    "fuse_notify_poll_wakeup_out": "kh:Q",
    "fuse_fallocate_in": "fh:Q offset:Q length:Q mode:I _padding:I",
    "fuse_dirent": "ino:Q off:Q namelen:I type:I",
    "fuse_lseek_in": "fh:Q offset:Q whence:I _padding:I",
    "fuse_lseek_out": "offset:Q",
    "fuse_copy_file_range_in": "fh_in:Q off_in:Q nodeid_out:Q fh_out:Q off_out:Q len:Q flags:Q",
    "fuse_copy_file_range_out": "bytes_copied:Q",
    "fuse_setupmapping_in": "fh:Q foffset:Q len:Q flags:Q moffset:Q",
    "fuse_removemapping_in": "count:I",
    "fuse_removemapping_one": "moffset:Q len:Q",
    "fuse_syncfs_in": "_padding:Q",
    "fuse_secctx": "size:I _padding:I",
    "fuse_secctx_header": "size:I nr_secctx:I",
    "fuse_ext_header": "size:I type:I",
    "fuse_supp_groups": "nr_groups:I",
    "fuse_notify_inval_inode_out": "ino:Q off:q len:q",
    "fuse_notify_inval_entry_out": "parent:Q namelen:I flags:I",
    "fuse_notify_delete_out": "parent:Q child:Q namelen:I _padding:I",
    "fuse_notify_store_out": "nodeid:Q offset:Q size:I _padding:I",
    "fuse_notify_retrieve_out": "notify_unique:Q nodeid:Q offset:Q size:I _padding:I",
    "fuse_notify_retrieve_in": "_dummy1:Q offset:Q size:I _dummy2:I _dummy3:Q _dummy4:Q",
    "fuse_notify_prune_out": "count:I _padding:I _spare:Q",
    "fuse_backing_map": "fd:i flags:I _padding:Q",
}


def layout(name: str) -> Struct:
    """Give the compiled `Struct` of a uapi struct; its padding is skipped on unpack and zero on pack."""
    codes = ["="]
    for field in LAYOUTS[name].split():
        label, _, code = field.partition(":")
        codes.append(f"{calcsize('=' + code)}x" if label.startswith("_") else code)
    return Struct("".join(codes))


class Op(NamedTuple):
    """One row: what a request looks like, which method serves it, how its result becomes a reply.

    `args` is the struct after the header, `names` the count of NUL-terminated names after that, `tail` whether bytes
    follow (write data, an xattr's value, ioctl input, forget items). `caller` tells whether the method is given the
    caller's ids. `reply` names the encoder in `codec` ("" for a request that never gets a reply).
    """

    code: int
    name: str
    args: str
    names: int
    tail: bool
    caller: bool
    reply: str


def _op(
    code: int, name: str, args: str = "", names: int = 0, *, reply: str, tail: bool = False, who: bool = False
) -> Op:
    return Op(code, name, args, names, tail, who, reply)


TABLE: tuple[Op, ...] = (
    _op(abi.FUSE_LOOKUP, "lookup", names=1, who=True, reply="entry"),
    _op(abi.FUSE_FORGET, "forget", "fuse_forget_in", reply=""),
    _op(abi.FUSE_GETATTR, "getattr", "fuse_getattr_in", reply="attr"),
    _op(abi.FUSE_SETATTR, "setattr", "fuse_setattr_in", who=True, reply="attr"),
    _op(abi.FUSE_READLINK, "readlink", reply="link"),
    _op(abi.FUSE_SYMLINK, "symlink", names=2, who=True, reply="entry"),
    _op(abi.FUSE_MKNOD, "mknod", "fuse_mknod_in", 1, who=True, reply="entry"),
    _op(abi.FUSE_MKDIR, "mkdir", "fuse_mkdir_in", 1, who=True, reply="entry"),
    _op(abi.FUSE_UNLINK, "unlink", names=1, who=True, reply="none"),
    _op(abi.FUSE_RMDIR, "rmdir", names=1, who=True, reply="none"),
    _op(abi.FUSE_RENAME, "rename", "fuse_rename_in", 2, who=True, reply="none"),
    _op(abi.FUSE_LINK, "link", "fuse_link_in", 1, who=True, reply="entry"),
    _op(abi.FUSE_OPEN, "open", "fuse_open_in", who=True, reply="open"),
    _op(abi.FUSE_READ, "read", "fuse_read_in", reply="data"),
    _op(abi.FUSE_WRITE, "write", "fuse_write_in", tail=True, reply="count"),
    _op(abi.FUSE_STATFS, "statfs", reply="statfs"),
    _op(abi.FUSE_RELEASE, "release", "fuse_release_in", reply="none"),
    _op(abi.FUSE_FSYNC, "fsync", "fuse_fsync_in", reply="none"),
    _op(abi.FUSE_SETXATTR, "setxattr", "fuse_setxattr_in", 1, tail=True, who=True, reply="none"),
    _op(abi.FUSE_GETXATTR, "getxattr", "fuse_getxattr_in", 1, who=True, reply="xattr"),
    _op(abi.FUSE_LISTXATTR, "listxattr", "fuse_getxattr_in", who=True, reply="xattr"),
    _op(abi.FUSE_REMOVEXATTR, "removexattr", names=1, who=True, reply="none"),
    _op(abi.FUSE_FLUSH, "flush", "fuse_flush_in", reply="none"),
    _op(abi.FUSE_INIT, "init", "fuse_init_in", reply="init"),
    _op(abi.FUSE_OPENDIR, "opendir", "fuse_open_in", who=True, reply="open"),
    _op(abi.FUSE_READDIR, "readdir", "fuse_read_in", reply="data"),
    _op(abi.FUSE_RELEASEDIR, "releasedir", "fuse_release_in", reply="none"),
    _op(abi.FUSE_FSYNCDIR, "fsyncdir", "fuse_fsync_in", reply="none"),
    _op(abi.FUSE_GETLK, "getlk", "fuse_lk_in", who=True, reply="lock"),
    _op(abi.FUSE_SETLK, "setlk", "fuse_lk_in", who=True, reply="none"),
    _op(abi.FUSE_SETLKW, "setlkw", "fuse_lk_in", who=True, reply="none"),
    _op(abi.FUSE_ACCESS, "access", "fuse_access_in", who=True, reply="none"),
    _op(abi.FUSE_CREATE, "create", "fuse_create_in", 1, who=True, reply="create"),
    _op(abi.FUSE_INTERRUPT, "interrupt", "fuse_interrupt_in", reply=""),
    _op(abi.FUSE_BMAP, "bmap", "fuse_bmap_in", reply="u64"),
    _op(abi.FUSE_DESTROY, "destroy", reply="none"),
    _op(abi.FUSE_IOCTL, "ioctl", "fuse_ioctl_in", tail=True, who=True, reply="ioctl"),
    _op(abi.FUSE_POLL, "poll", "fuse_poll_in", reply="poll"),
    _op(abi.FUSE_NOTIFY_REPLY, "notify_reply", "fuse_notify_retrieve_in", tail=True, reply=""),
    _op(abi.FUSE_BATCH_FORGET, "batch_forget", "fuse_batch_forget_in", tail=True, reply=""),
    _op(abi.FUSE_FALLOCATE, "fallocate", "fuse_fallocate_in", reply="none"),
    _op(abi.FUSE_READDIRPLUS, "readdirplus", "fuse_read_in", reply="data"),
    _op(abi.FUSE_RENAME2, "rename2", "fuse_rename2_in", 2, who=True, reply="none"),
    _op(abi.FUSE_LSEEK, "lseek", "fuse_lseek_in", reply="u64"),
    _op(abi.FUSE_COPY_FILE_RANGE, "copy_file_range", "fuse_copy_file_range_in", reply="count"),
    _op(abi.FUSE_SETUPMAPPING, "setupmapping", "fuse_setupmapping_in", reply="none"),
    _op(abi.FUSE_REMOVEMAPPING, "removemapping", "fuse_removemapping_in", tail=True, reply="none"),
    _op(abi.FUSE_SYNCFS, "syncfs", "fuse_syncfs_in", reply="none"),
    _op(abi.FUSE_TMPFILE, "tmpfile", "fuse_create_in", 1, who=True, reply="create"),
    _op(abi.FUSE_STATX, "statx", "fuse_statx_in", reply="statx"),
    _op(abi.FUSE_COPY_FILE_RANGE_64, "copy_file_range_64", "fuse_copy_file_range_in", reply="u64"),
)

# Rows are found by index; the largest opcode of the protocol but CUSE_INIT, which no filesystem gets.
OPCODE_LIMIT = 64
