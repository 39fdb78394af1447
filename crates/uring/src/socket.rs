//! The few socket options that no safe library sets or asks for.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Leaves the choice of the local port to `connect(2)` after a `bind(2)` to an address with port 0
/// (`IP_BIND_ADDRESS_NO_PORT`, `ip(7)`, Linux 4.2; it serves IPv6 sockets too). Without it each source address has one
/// pool of ports for all destinations together; with it, one for each destination.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Leaves the choice of the local port to the kernel, but from these (`IP_LOCAL_PORT_RANGE`, `ip(7)`, Linux 6.3; it serves IPv6
/// sockets too) and those of `net.ipv4.ip_local_port_range`.
///
/// # Errors
/// As `setsockopt(2)`; `ENOPROTOOPT` from older kernels.
pub fn local_ports(socket: BorrowedFd<'_>, ports: RangeInclusive<u16>) -> io::Result<()> {
    /// linux/in.h; the libc crate does not have it.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let value = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    set(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, value.cast_signed())
}

/// Accepts a connection only when its first bytes are there, or after `seconds` (`TCP_DEFER_ACCEPT`, `tcp(7)`; the kernel
/// counts in retransmissions of its SYN-ACK and rounds up).
///
/// # Errors
/// As `setsockopt(2)`.
pub fn defer_accept(listener: BorrowedFd<'_>, seconds: u16) -> io::Result<()> {
    set(listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, seconds.into())
}

/// Takes bytes that come with a SYN, of at most `waiting` connections whose handshake is not complete (`TCP_FASTOPEN`,
/// `tcp(7)`, RFC 7413). Without bit 2 of `net.ipv4.tcp_fastopen` it does nothing.
///
/// # Errors
/// As `setsockopt(2)`; `EINVAL` for a socket that is connected.
pub fn fast_open(listener: BorrowedFd<'_>, waiting: u16) -> io::Result<()> {
    set(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, waiting.into())
}

/// Sends the first bytes with the SYN where the peer gave us a cookie for that before (`TCP_FASTOPEN_CONNECT`, Linux 4.11,
/// RFC 7413). `connect(2)` then succeeds at once and sends nothing: the first `send(2)` does, until which the socket cannot
/// be received from (`ENOTCONN`), and what goes wrong with connecting comes from sending and receiving.
///
/// # Errors
/// As `setsockopt(2)`; `EOPNOTSUPP` without bit 1 of `net.ipv4.tcp_fastopen`.
pub fn fast_open_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// Lets a UDP socket receive datagrams of one sender that came together as a train (`UDP_GRO`, `udp(7)`, Linux 5.0).
pub fn receive_trains(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Lets a UDP socket tell with each datagram to which address it was sent (`IP_PKTINFO`, `ip(7)`; `IPV6_RECVPKTINFO`,
/// `ipv6(7)`).
pub fn receive_destination(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
    }
}

/// Lets polls of the socket tell of bytes only when so many are there, or FIN or an error (`SO_RCVLOWAT`, `socket(7)`; TCP
/// heeds it in polls since Linux 2.6.28). The kernel takes at most half of the receive buffer for it. Receives heed it too:
/// 1 is as before.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn set_receive_low_water(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, i32::try_from(bytes).unwrap_or(i32::MAX))
}

/// For how long TCP has sent no bytes to the peer, be it for the first time or again (`tcpi_last_data_sent` of `TCP_INFO`, `tcp(7)`; to
/// the kernel's tick). On a connection that never sent any: since it was made.
///
/// # Errors
/// As `getsockopt(2)`.
pub fn sent_nothing_for(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    // SAFETY: tcp_info is a C struct of integers, for which all zeroes is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of the struct, and any bytes are a value of it. It is done with
    // both pointers when the call returns. The descriptor is open: it is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(Duration::from_millis(info.tcpi_last_data_sent.into()))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Options whose value is an int.
fn set(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the options of this module take an int, and are given a pointer to one with its size; the kernel copies it
    // before the call returns. The descriptor is open: it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(&value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
