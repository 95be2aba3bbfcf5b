"""The system call filter: calls that get around the limits, or that reach other processes, fail.

A program of classic BPF over (system call number, architecture, arguments), as seccomp(2) describes.
"""

import struct

LOAD, JUMP_EQUAL, JUMP_LEAST, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, FAIL = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x00010000
X32 = 0x40000000  # numbers from here on are those of another calling convention

# Other processes, since limits of memory and CPU time are those of one process: `clone` makes threads only.
# Memory that no limit counts: memfd, System V and POSIX IPC, extended attributes of files in `/tmp`. New
# namespaces and mounts: file systems without a size. What reaches into other processes, and parts of the
# kernel that candidates have no use for. Scheduling: a candidate that gives way to all others waits for a CPU
# for as long as the machine is busy, and time of waiting does not count.
_NEWER = {  # of the same number on all machines
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "memfd_secret": 447,
    "setxattrat": 463,
}
_FORBIDDEN = {
    "x86_64": _NEWER
    | {
        "fork": 57,
        "vfork": 58,
        "memfd_create": 319,
        "shmget": 29,
        "semget": 64,
        "msgget": 68,
        "mq_open": 240,
        "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "unshare": 272,
        "setns": 308,
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "chroot": 161,
        "personality": 135,
        "bpf": 321,
        "perf_event_open": 298,
        "userfaultfd": 323,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "setpriority": 141,
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "sched_setaffinity": 203,
        "sched_setattr": 314,
    },
    "aarch64": _NEWER
    | {
        "memfd_create": 279,
        "shmget": 194,
        "semget": 190,
        "msgget": 186,
        "mq_open": 180,
        "ptrace": 117,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "unshare": 97,
        "setns": 268,
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "chroot": 51,
        "personality": 92,
        "bpf": 280,
        "perf_event_open": 241,
        "userfaultfd": 282,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "name_to_handle_at": 264,
        "open_by_handle_at": 265,
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
        "setpriority": 140,
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "sched_setattr": 274,
    },
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
# Unix, IPv4 and IPv6: their addresses belong to the network namespace. Those of a virtual machine's sockets
# (AF_VSOCK) reach the host from any namespace.
FAMILIES = (1, 2, 10)
CLONE3 = 435  # its flags lie in memory, which a filter cannot read; libraries then use clone


def program(machine: str) -> bytes | None:
    """The filter for a machine as `os.uname` names it; None if there is none for it."""
    if machine not in _AUDIT:
        return None
    refuse, unknown = _one(RETURN, FAIL | EPERM), _one(RETURN, FAIL | ENOSYS)
    code = [
        _one(LOAD, ARCHITECTURE),
        _one(JUMP_EQUAL, _AUDIT[machine], yes=1),
        refuse,
        _one(LOAD, NUMBER),
        _one(JUMP_LEAST, X32, no=1),
        refuse,
        _one(JUMP_EQUAL, CLONE3, no=1),
        unknown,
    ]
    for number in sorted(_FORBIDDEN[machine].values()):
        code += [_one(JUMP_EQUAL, number, no=1), refuse]
    code += [_one(JUMP_EQUAL, _SOCKET[machine], no=2 + len(FAMILIES)), _one(LOAD, FIRST_ARGUMENT)]
    code += [_one(JUMP_EQUAL, family, yes=len(FAMILIES) - place) for place, family in enumerate(FAMILIES)]
    code += [
        refuse,
        _one(LOAD, NUMBER),
        _one(JUMP_EQUAL, _CLONE[machine], no=3),
        _one(LOAD, FIRST_ARGUMENT),
        _one(JUMP_SET, CLONE_THREAD, yes=1),
        refuse,
        _one(RETURN, ALLOW),
    ]
    return b"".join(code)


def _one(operation: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, yes, no, value)
