//! The workers of one life, side by side. Some come while the others run.

use crate::worker::Worker;
use futures_util::future::maybe_done;
use futures_util::task::AtomicWaker;
use std::cell::RefCell;
use std::task::Poll;

/// See the module.
#[derive(Default)]
pub struct Crew {
    newcomers: RefCell<Vec<Worker>>,
    waker: AtomicWaker,
}

impl Crew {
    /// One more, which begins with the others.
    pub fn join(&self, worker: Worker) {
        self.newcomers.borrow_mut().push(worker);
        self.waker.wake();
    }

    /// Has each do this, until all have done it.
    pub async fn run<F: Future>(
        &self,
        first: Vec<Worker>,
        does: impl Fn(Worker) -> F,
    ) -> Vec<F::Output> {
        let mut all = Vec::new();
        let mut new = first;
        std::future::poll_fn(|context| {
            self.waker.register(context.waker());
            new.append(&mut self.newcomers.borrow_mut());
            all.extend(new.drain(..).map(|worker| Box::pin(maybe_done(does(worker)))));
            // Each is looked at, in one order.
            let mut pending = false;
            for one in &mut all {
                pending |= one.as_mut().poll(context).is_pending();
            }
            if pending { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        all.iter_mut().filter_map(|one| one.as_mut().take_output()).collect()
    }
}
