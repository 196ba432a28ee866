//! Goal: whatever a guest agent does, something is done to the guest only while it is frozen, and in the end the guest is thawed or
//! the debt is on record.
//!
//! Method: a peer in the place of the guest agent that misbehaves step by step, and a clock that jumps.

use super::*;
use crate::guest_agent::peer::{Act, Peer};

const LONG: Duration = Duration::from_secs(3600);

/// Does something that must be done to a frozen guest.
async fn done(peer: &Peer) -> Result<u8> {
    assert!(peer.is_frozen(), "{}", peer.events());
    peer.note("DONE");
    Ok(7)
}

async fn run(peer: &Peer) -> (Arc<Quiescing>, Ended<u8>) {
    let quiescing = Quiescing::open(peer.dir.path());
    let ended = quiescing.frozen(&peer.socket, Times::default(), done(peer)).await;
    (quiescing, ended)
}

/// In the end.
async fn expect_thawed(peer: &Peer, quiescing: &Arc<Quiescing>) {
    tokio::time::sleep(LONG).await;
    assert!(!peer.is_frozen(), "{}", peer.events());
    assert_eq!(quiescing.owed(), []);
    assert!(quiescing.guests.lock().is_empty());
    assert_eq!(notes(peer), "{}");
}

fn notes(peer: &Peer) -> String {
    std::fs::read_to_string(peer.dir.path().join(FILE)).unwrap_or_else(|_| "{}".into())
}

fn words(ended: &Ended<u8>) -> String {
    ended.frozen.as_ref().unwrap_err().to_string()
}

#[tokio::test(start_paused = true)]
async fn it_is_done_between_the_answer_to_the_freeze_and_the_thaw() {
    let peer = Peer::new([("freeze", Act::Late(Duration::from_secs(9)))]);
    let quiescing = Quiescing::open(peer.dir.path());
    let what = async {
        assert!(notes(&peer).contains("agent.sock"), "noted before: {}", notes(&peer));
        done(&peer).await
    };
    let ended = quiescing.frozen(&peer.socket, Times::default(), what).await;
    assert_eq!(peer.events(), "delimited status freeze DONE status thaw status");
    assert_eq!(ended.frozen.unwrap(), 3);
    assert_eq!(ended.done.unwrap().unwrap(), 7);
    assert_eq!(ended.not_held, None);
    ended.thawed.unwrap();
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_done_without_a_freeze_and_what_may_be_frozen_is_thawed() {
    let many = vec![b'x'; 200_000];
    for (act, said) in [
        (Act::Mute, "no answer to guest-fsfreeze-freeze within 10s"),
        (Act::Deaf, "--freeze-timeout"),
        (Act::Late(Duration::from_secs(12)), "no answer to guest-fsfreeze-freeze"),
        (Act::Refuse("hook has failed"), "hook has failed"),
        (Act::Complain("one is busy"), "one is busy"),
        (Act::Close, "the connection failed"),
        (Act::Say(b"{\"return\": \"many\"}".to_vec()), "no number of file systems"),
        (Act::Say(b"{\"return\": -1}".to_vec()), "no number of file systems"),
        (Act::Say(b"{\"return\": 0}".to_vec()), "froze no file system"),
        (Act::Say(b"]".to_vec()), "makes no sense"),
        (Act::Say(many), "longer than"),
    ] {
        let peer = Peer::new([("freeze", act.clone())]);
        let (quiescing, ended) = run(&peer).await;
        assert!(words(&ended).contains(said), "{act:?}: {}", words(&ended));
        assert!(ended.done.is_none());
        assert!(ended.thawed.is_ok(), "{act:?}: {ended:?}");
        assert!(!peer.is_frozen(), "{act:?}: {}", peer.events());
        expect_thawed(&peer, &quiescing).await;
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_frozen_that_was_not_understood_before() {
    for (step, act, said) in [
        ("delimited", Act::Mute, "virsh domfsfreeze"),
        ("delimited", Act::Close, "is this the socket of a guest agent"),
        ("status", Act::Deaf, "no answer to guest-fsfreeze-status"),
        ("status", Act::Refuse("disabled for this instance"), "disabled for this instance"),
        ("status", Act::Say(b"{\"return\": \"melting\"}".to_vec()), "neither 'frozen' nor"),
    ] {
        let peer = Peer::new([(step, act)]);
        let (quiescing, ended) = run(&peer).await;
        assert!(words(&ended).contains(said), "{}", words(&ended));
        assert!(!peer.events().contains("freeze"), "{}", peer.events());
        expect_thawed(&peer, &quiescing).await;
    }
    let peer = Peer::new([]);
    std::fs::remove_file(&peer.socket).unwrap();
    let (quiescing, ended) = run(&peer).await;
    assert_eq!(ended.frozen.as_ref().unwrap_err().kind, Kind::NotFound);
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn what_others_froze_is_theirs() {
    let peer = Peer::new([]);
    peer.state.lock().frozen = 1;
    let (quiescing, ended) = run(&peer).await;
    assert_eq!(ended.frozen.as_ref().unwrap_err().kind, Kind::Conflict);
    tokio::time::sleep(LONG).await;
    assert_eq!(peer.events(), "delimited status");
    assert_eq!(quiescing.owed(), []);
}

#[tokio::test(start_paused = true)]
async fn without_a_note_nothing_is_frozen() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(&peer.dir.path().join("nowhere"));
    let ended = quiescing.frozen(&peer.socket, Times::default(), done(&peer)).await;
    assert!(words(&ended).contains("without a note"), "{}", words(&ended));
    assert_eq!(peer.events(), "delimited status");
    assert!(quiescing.guests.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_thaw_is_repeated_until_the_guest_says_that_it_is_thawed() {
    for act in [
        Act::Mute,
        Act::Deaf,
        Act::Close,
        Act::Refuse("not now"),
        Act::Say(b"thawed, trust me".to_vec()),
        Act::Late(Duration::from_secs(7)),
    ] {
        let peer = Peer::new([("thaw", act.clone())]);
        let (quiescing, ended) = run(&peer).await;
        let (told, done) = (ended.thawed, ended.done.unwrap().unwrap());
        // In time, or by a task afterwards.
        assert_eq!(told.is_err(), peer.is_frozen() || !quiescing.owed().is_empty(), "{act:?}");
        assert_eq!(done, 7);
        expect_thawed(&peer, &quiescing).await;
    }
    // The state that is asked for afterwards is lost, too.
    let peer = Peer::new([("status", Act::Well), ("status", Act::Well), ("status", Act::Close)]);
    let (quiescing, ended) = run(&peer).await;
    ended.thawed.unwrap();
    assert_eq!(ended.not_held, None, "it was thawed by us: {}", peer.events());
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stays_frozen_is_told_and_thawed_when_it_can_be() {
    let peer = Peer::new(std::iter::repeat_n(("thaw", Act::Refuse("no")), 300));
    let (quiescing, ended) = run(&peer).await;
    assert_eq!(ended.thawed.unwrap_err().kind, Kind::GuestFrozen);
    assert_eq!(ended.done.unwrap().unwrap(), 7);
    let owed = quiescing.owed();
    assert_eq!(owed.len(), 1);
    assert_eq!(owed[0].guest_agent, peer.socket);
    assert!(notes(&peer).contains("agent.sock"));
    let (again, said) = {
        let ended = quiescing.frozen(&peer.socket, Times::default(), done(&peer)).await;
        (ended.frozen.as_ref().unwrap_err().kind, words(&ended))
    };
    assert!(again == Kind::Conflict && said.contains("may still be frozen"), "{said}");
    assert!(peer.is_frozen());
    peer.state.lock().acts.clear();
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_happens_after_all_is_undone() {
    let peer = Peer::new([("freeze", Act::Late(Duration::from_secs(600)))]);
    let (quiescing, ended) = run(&peer).await;
    assert!(ended.frozen.is_err() && ended.done.is_none());
    assert_eq!(ended.thawed.unwrap_err().kind, Kind::GuestFrozen, "nobody knows");
    assert!(!peer.events().contains("freeze"), "not yet: {}", peer.events());
    expect_thawed(&peer, &quiescing).await;
    assert!(peer.events().contains("freeze"), "{}", peer.events());
}

#[tokio::test(start_paused = true)]
async fn what_ends_badly_meanwhile_is_followed_by_a_thaw() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(peer.dir.path());
    let failing = async { Err::<u8, _>(Failure::new(Kind::Unavailable, "the log is full")) };
    let ended = quiescing.frozen(&peer.socket, Times::default(), failing).await;
    assert_eq!(ended.done.unwrap().unwrap_err().message, "the log is full");
    ended.thawed.unwrap();
    expect_thawed(&peer, &quiescing).await;

    // A request that panics.
    let (socket, in_task) = (peer.socket.clone(), Arc::clone(&quiescing));
    let task = tokio::spawn(async move {
        let panicking = async { panic!("a bug") };
        in_task.frozen::<u8>(&socket, Times::default(), panicking).await
    });
    assert!(task.await.unwrap_err().is_panic());
    assert!(peer.is_frozen() && quiescing.owed().len() == 1);
    expect_thawed(&peer, &quiescing).await;

    // One that is ended from outside.
    let (socket, in_task) = (peer.socket.clone(), Arc::clone(&quiescing));
    let task = tokio::spawn(async move {
        in_task.frozen::<u8>(&socket, Times::default(), std::future::pending()).await
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(peer.is_frozen());
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_did_not_last_is_told() {
    for (meanwhile, said) in [(0, "something else had thawed"), (2, "only 2 of 3")] {
        let peer = Peer::new([]);
        let quiescing = Quiescing::open(peer.dir.path());
        let what = async {
            peer.state.lock().frozen = meanwhile;
            Ok(7)
        };
        let ended = quiescing.frozen(&peer.socket, Times::default(), what).await;
        ended.thawed.unwrap();
        assert!(
            ended.not_held.as_ref().is_some_and(|why| why.contains(said)),
            "{:?}",
            ended.not_held
        );
        expect_thawed(&peer, &quiescing).await;
    }
    // As Windows says it.
    let peer = Peer::new([("thaw", Act::Complain("fsfreeze is limited up to 10 seconds"))]);
    let (quiescing, ended) = run(&peer).await;
    ended.thawed.unwrap();
    assert!(ended.not_held.is_some_and(|why| why.contains("limited")));
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn one_at_a_time() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(peer.dir.path());
    let inside = async {
        let second = quiescing.frozen(&peer.socket, Times::default(), done(&peer)).await;
        assert!(words(&second).contains("under way"), "{}", words(&second));
        done(&peer).await
    };
    let first = quiescing.frozen(&peer.socket, Times::default(), inside).await;
    assert_eq!(first.done.unwrap().unwrap(), 7);
    expect_thawed(&peer, &quiescing).await;
}

#[tokio::test(start_paused = true)]
async fn the_next_agent_pays_what_a_killed_one_owed() {
    let peer = Peer::new([]);
    let (_, ended) = run(&peer).await;
    ended.thawed.unwrap();
    // As a kill leaves it.
    peer.state.lock().frozen = 3;
    let note = |socket: &Path| serde_json::json!({ socket.to_str().unwrap(): { "since": 5 } });
    let file = peer.dir.path().join(FILE);
    std::fs::write(&file, note(&peer.socket).to_string()).unwrap();
    let quiescing = Quiescing::open(peer.dir.path());
    assert_eq!(quiescing.owed()[0].since, 5);
    expect_thawed(&peer, &quiescing).await;

    // Nobody is left to be thawed.
    std::fs::write(&file, note(Path::new("/nowhere/agent.sock")).to_string()).unwrap();
    expect_thawed(&peer, &Quiescing::open(peer.dir.path())).await;
    std::fs::write(&file, "junk").unwrap();
    assert_eq!(Quiescing::open(peer.dir.path()).owed(), []);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_lets_go_first() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(peer.dir.path());
    let stop = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(peer.is_frozen());
        quiescing.settle(Instant::now() + LONG).await;
        assert!(!peer.is_frozen(), "settled");
    };
    let request = quiescing.frozen::<u8>(&peer.socket, Times::default(), std::future::pending());
    let (ended, ()) = tokio::join!(request, stop);
    assert_eq!(ended.done.unwrap().unwrap_err().kind, Kind::Unavailable);
    ended.thawed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_takes_no_guest_in_hand() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(peer.dir.path());
    quiescing.settle(Instant::now()).await;
    let ended = quiescing.frozen(&peer.socket, Times::default(), done(&peer)).await;
    assert!(words(&ended).contains("is stopping"), "{}", words(&ended));
    assert_eq!(peer.events(), "");
    assert_eq!(*quiescing.requests.borrow(), 0);
    expect_thawed(&peer, &quiescing).await;
}

/// Between its thaw and its end the guest is another's already.
#[tokio::test(start_paused = true)]
async fn a_request_whose_guest_is_thawed_lets_the_next_one_alone() {
    let peer = Peer::new([]);
    let quiescing = Quiescing::open(peer.dir.path());
    let take = || quiescing.take_in_hand(&peer.socket, Times::default()).unwrap();
    let mut first = take();
    assert!(!first.guest.prepare().await.unwrap());
    first.begin().unwrap();
    assert_eq!(first.guest.freeze().await.unwrap(), 3);
    first.pay(LONG).await.unwrap();
    let mut next = take();
    assert!(!next.guest.prepare().await.unwrap());
    next.begin().unwrap();
    drop(first);
    let state = quiescing.guests.lock().get(&peer.socket).cloned();
    assert!(matches!(state, Some(InHand::Frozen(_))), "{state:?}");
    drop(next);
    expect_thawed(&peer, &quiescing).await;
}
