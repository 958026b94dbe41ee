"""Runs a function of this very process on an emulated processor (Bochs) that has AVX-512 and AVX512_BF16.

The guest's virtual addresses are the process's own: page tables of 1 GiB pages give every gigabyte that the process
uses a slot of guest-physical memory, and a guest-physical page, when first touched, is the process's page. So code,
data, heap and thread-local variables are the real ones, and only the instructions are emulated. The guest stays in ring
0, where two HLT instructions stop it: the address the function returns to, and the handler of SYSCALL, whose system
calls are made natively.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
from pathlib import Path
from types import ModuleType

PAGE = 4096
GIB = 1 << 30
STACK = 64 << 20
ARCH_PRCTL, ARCH_GET_FS = 158, 0x1003
USER_TABLES = 256  # of the 512 entries of the top table, those below the kernel's half
# Present, writable, accessed; a page of 1 GiB also dirty and large.
TABLE, LARGE_PAGE = 0x23, 0xE3
X87_SSE_AVX_AVX512 = 0xE7

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p


def _anonymous(size: int) -> int:
    read_write, private_anonymous = 3, 0x22
    return libc.mmap(None, ctypes.c_size_t(size), read_write, private_anonymous, -1, ctypes.c_long(0))


def write_code(address: int, code: bytes) -> None:
    first = address // PAGE * PAGE
    size = address + len(code) - first
    if libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), 7) != 0:
        raise OSError(ctypes.get_errno(), f"mprotect at {address:#x}")
    ctypes.memmove(address, code, len(code))


def jump(to: int) -> bytes:
    return bytes.fromhex("48b8") + to.to_bytes(8, "little") + bytes.fromhex("ffe0")  # movabs rax, to; jmp rax


def _load_bochs() -> ModuleType:
    """Imports bochscpu, whose wheel wants two names of glibc 2.38, and makes its processor a Sapphire Rapids."""
    if not hasattr(libc, "__isoc23_sscanf"):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "names.c"), Path(folder, "names.so")
            names = [f".globl __isoc23_{name}\\n__isoc23_{name}: jmp {name}@PLT\\n" for name in ("sscanf", "strtoull")]
            source.write_text(f'__asm__("{"".join(names)}");')
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    # NOTE: version 0.4.0 always asks for this model of 2018, which has AVX-512 without bfloat16.
    library = ctypes.CDLL(bochscpu._bochscpu.__file__)
    asked, wanted = (
        ctypes.cast(getattr(library, f"_Z{len(name)}{name}P8BX_CPU_C"), ctypes.c_void_p).value
        for name in ("create_corei3_cnl_cpuid", "create_sapphire_rapids_cpuid")
    )
    write_code(asked, jump(wanted))
    return bochscpu


class Emulator:
    def __init__(self) -> None:
        self.bochs = _load_bochs()
        self.lock = threading.Lock()
        self.stack = _anonymous(STACK)
        # The top table, the tables below it, and a page of HLT; guest-physical from PAGE on.
        base = _anonymous((USER_TABLES + 2) * PAGE)
        self.tables = (ctypes.c_uint64 * ((USER_TABLES + 1) * 512)).from_address(base)
        self.returned = base + (USER_TABLES + 1) * PAGE
        self.system_call = self.returned + 64
        ctypes.memset(self.returned, 0xF4, PAGE)
        for i in range(USER_TABLES):
            self.tables[i] = (i + 2) * PAGE | TABLE
        for i in range(USER_TABLES + 1):
            self.bochs.memory.page_insert((i + 1) * PAGE, base + i * PAGE)
        self.gigabytes: list[int] = []  # of virtual addresses; the i-th has the i + 1st GiB of the guest's memory
        self.session = self.bochs.Session()
        self.session.missing_page_handler = self._insert_page
        self.hook = self.bochs.Hook()
        self.hook.hlt = lambda session, cpu: session.stop()
        self.hook.exception = self._report

    def _insert_page(self, guest: int) -> None:
        host = self.gigabytes[guest // GIB - 1] * GIB + guest % GIB
        self.bochs.memory.page_insert(guest // PAGE * PAGE, host // PAGE * PAGE)

    def _report(self, session, cpu: int, vector: int, code: int) -> None:
        state = session.cpu.state
        # NOTE: the process cannot go on from here: no frame above this one expects an error.
        print(f"processor exception {vector} ({code}) at {state.rip:#x}, address {state.cr2:#x}", flush=True)
        libc.abort()

    def _map_process(self) -> None:
        known = set(self.gigabytes)
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
            for gigabyte in range(first // GIB, (end - 1) // GIB + 1):
                if gigabyte < USER_TABLES * 512 and gigabyte not in known:
                    known.add(gigabyte)
                    self.gigabytes.append(gigabyte)
                    self.tables[512 + gigabyte] = len(self.gigabytes) * GIB | LARGE_PAGE

    def _segment(self, selector: int, attributes: int, base: int = 0):
        segment = self.bochs.Segment()
        segment.present, segment.selector, segment.attr = True, selector, attributes
        segment.base, segment.limit = base, 0xFFFFFFFF
        return segment

    def _initial_state(self):
        state = self.bochs.State()
        self.bochs.cpu.set_long_mode(state)
        state.cr0 |= 1 << 1  # MP
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18  # OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE
        state.xcr0 = X87_SSE_AVX_AVX512
        state.cr3 = PAGE
        state.mxcsr, state.mxcsr_mask, state.fpcw = 0x1F80, 0xFFFF, 0x37F
        state.rflags = 2
        thread = ctypes.c_uint64()
        libc.syscall(ARCH_PRCTL, ARCH_GET_FS, ctypes.byref(thread))
        state.cs = self._segment(0x10, 0xA09B)
        state.ss = state.ds = state.es = state.gs = self._segment(0x18, 0xC093)
        state.fs = self._segment(0x18, 0xC093, thread.value)
        state.star, state.lstar = 0x10 << 32, self.system_call
        return state

    def _make_system_call(self, state) -> None:
        arguments = (state.rax, state.rdi, state.rsi, state.rdx, state.r10, state.r8, state.r9)
        result = libc.syscall(*map(ctypes.c_long, arguments))
        state.rax = (result if result != -1 else -ctypes.get_errno()) % (1 << 64)
        state.rip, state.rflags = state.rcx, state.r11
        self._map_process()

    def call(self, function: int, *arguments: int) -> tuple[int, int]:
        """rax and the low half of xmm0 after a call of the function at this address with integers or pointers."""
        with self.lock:
            self._map_process()
            state = self._initial_state()
            state.rip, state.rsp = function, self.stack + STACK - PAGE - 8
            ctypes.c_uint64.from_address(state.rsp).value = self.returned
            for register, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False):
                setattr(state, register, value)
            while True:
                self.session.cpu.state = state
                self.session.run([self.hook])
                state = self.session.cpu.state
                if state.rip == self.returned + 1:
                    return state.rax, state.zmm[0].q[0]
                assert state.rip == self.system_call + 1, f"stopped at {state.rip:#x}"
                self._make_system_call(state)
