//! Proof that a target reinstates sessions: a second login under the same initiator name and ISID must
//! end the first session. Without that, a write of a lost session could land after a newer one.

use super::context::{Context, Login, Notice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::time::{Duration, Instant};

/// Logs in as `login` from a connection of its own, and keeps it until `done` says so or `limit` is
/// over. Returns whether `done` did. Blocks the thread.
pub fn second_login(
    login: &Login,
    limit: Duration,
    done: impl Fn() -> bool,
) -> Result<bool, String> {
    let end = Instant::now() + limit;
    let mut context = Context::new(login)?;
    context.connect(login)?;
    while Instant::now() < end {
        if done() {
            return Ok(true);
        }
        if let Some(fd) = context.fd() {
            let events = PollFlags::from_bits_truncate(context.events());
            let mut fds = [PollFd::new(fd, events)];
            let _ = poll(&mut fds, PollTimeout::from(20_u8));
            let revents = fds[0].revents().unwrap_or(PollFlags::empty()).bits();
            let serviced = context.service(revents);
            let notices = context.notices();
            for notice in notices {
                match notice {
                    Notice::Connected(connected) => {
                        connected?;
                        context.log_in()?;
                    }
                    Notice::LoggedIn(logged_in) => logged_in?,
                    _ => {}
                }
            }
            // The first session may already have come back and ended this one.
            if serviced.is_err() && !done() {
                serviced?;
            }
        }
    }
    Ok(done())
}
