//! The few socket options that no safe library sets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Leaves the choice of the local port to `connect(2)` after a `bind(2)` to an address with port 0
/// (`IP_BIND_ADDRESS_NO_PORT`, `ip(7)`, Linux 4.2; it serves IPv6 sockets too). Without it each source address has one
/// pool of ports for all destinations together; with it, one for each destination.
pub fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    switch_on(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)
}

/// Lets a UDP socket receive datagrams of one sender that came together as a train (`UDP_GRO`, `udp(7)`, Linux 5.0).
pub fn receive_trains(socket: BorrowedFd<'_>) -> io::Result<()> {
    switch_on(socket, libc::SOL_UDP, libc::UDP_GRO)
}

/// Lets a UDP socket tell with each datagram to which address it was sent (`IP_PKTINFO`, `ip(7)`; `IPV6_RECVPKTINFO`,
/// `ipv6(7)`).
pub fn receive_destination(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        switch_on(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        switch_on(socket, libc::IPPROTO_IP, libc::IP_PKTINFO)
    }
}

fn switch_on(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the options above take an int, and are given a pointer to one with its size; the kernel copies it before the
    // call returns. The descriptor is open: it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
