//! The one socket option that no safe library sets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Leaves the choice of the local port to `connect(2)` after a `bind(2)` to an address with port 0
/// (`IP_BIND_ADDRESS_NO_PORT`, `ip(7)`, Linux 4.2; it serves IPv6 sockets too). Without it each source address has one
/// pool of ports for all destinations together; with it, one for each destination.
pub fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, and is given a pointer to one with its size; the kernel copies it before the call
    // returns. The descriptor is open: it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            std::ptr::from_ref(&on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
