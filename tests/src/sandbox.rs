//! Sandboxes that refuse system calls, as container engines make them.
//!
//! A filter is installed by a few lines of python before the program is executed: it stays, and no code of ours has to be
//! unsafe for it.

use std::process::Command;

use rustix::io::Errno;

use crate::trimtab::binary;

/// `io_uring_setup`, `io_uring_enter`, `io_uring_register`: the same numbers on every architecture.
const IO_URING: (u32, u32) = (425, 427);
/// The last of them alone.
const IO_URING_REGISTER: (u32, u32) = (427, 427);

/// Installs a filter that answers system calls from the first to the last number with an errno, and executes the rest of the
/// command line (seccomp(2), BPF as in linux/filter.h).
const LAUNCHER: &str = r#"
import ctypes, os, struct, sys
first, last, errno = (int(number) for number in sys.argv[1:4])
LD, JGE, JGT, RET = 0x20, 0x35, 0x25, 0x06
ALLOW, ERRNO = 0x7fff0000, 0x00050000
program = [(LD, 0, 0, 0), (JGE, 0, 2, first), (JGT, 1, 0, last), (RET, 0, 0, ERRNO | errno), (RET, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
told = Program(len(program), ctypes.cast(code, ctypes.c_void_p))
libc = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, ctypes.byref(told), 0, 0):
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[4], sys.argv[4:])
"#;

/// What a sandbox refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// io_uring, with `EPERM`: Docker's default profile, and the sysctl `kernel.io_uring_disabled`.
    Forbids,
    /// io_uring, with `ENOSYS`: other container engines, and kernels without it.
    Hides,
    /// What io_uring registers, with `EINVAL`, as a kernel that has no buffer rings yet.
    IsOld,
    /// Locked memory beyond so many bytes (`RLIMIT_MEMLOCK`), which some kernels count rings against.
    LocksAtMost(u32),
}

impl Sandbox {
    /// A `trimtab` command in it. It ends when the thread that starts it does.
    ///
    /// # Panics
    /// When the binary is not built.
    #[track_caller]
    pub fn command(self, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).env_remove("RUST_LOG");
        let ((first, last), errno) = match self {
            Self::LocksAtMost(bytes) => {
                // Root may lock all it likes, unless it can never have the capability.
                command.args(["--bounding-set=-ipc_lock", "--", "prlimit"]);
                command.arg(format!("--memlock={bytes}:{bytes}")).arg(binary()).args(arguments);
                return command;
            }
            Self::Forbids => (IO_URING, Errno::PERM),
            Self::Hides => (IO_URING, Errno::NOSYS),
            Self::IsOld => (IO_URING_REGISTER, Errno::INVAL),
        };
        let numbers = [first as i32, last as i32, errno.raw_os_error()].map(|number| number.to_string());
        command.args(["--", "/usr/bin/python3", "-c", LAUNCHER]).args(numbers).arg(binary()).args(arguments);
        command
    }
}
