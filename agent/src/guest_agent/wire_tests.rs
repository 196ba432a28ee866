use super::peer::{Act, Peer};
use super::wire::{ANSWER_BYTES_MAX, Command, Connection, Trouble};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(5);

async fn ask(peer: &Peer) -> Result<serde_json::Value, Trouble> {
    let mut connection = Connection::open(&peer.socket, PATIENCE).await?;
    connection.ask(Command::Status, PATIENCE).await
}

#[tokio::test(start_paused = true)]
async fn what_former_clients_left_unread_is_not_taken_for_an_answer() {
    for left in [
        &b"{\"return\": \"frozen\"}\n"[..],
        b"{\"return\": \"fro",
        b"\xff{\"return\": 17}\n{\"return\": \"frozen\"}\n",
        b"\xff{\"return\": 1",
        b"\xff\xff\xffnonsense\n\xff{\"return\": \"frozen\"}\n",
        b"\xff{\"error\": {\"class\": \"x\", \"desc\": \"y\"}}\n",
    ] {
        let peer = Peer::new([]);
        peer.leave(left);
        assert_eq!(ask(&peer).await.unwrap(), "thawed", "{left:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn answers_that_make_no_sense_are_told_and_end_the_connection() {
    let deep = "[".repeat(10_000).into_bytes();
    let long = vec![b'x'; ANSWER_BYTES_MAX + 1];
    for (answer, words) in [
        (&b"thawed"[..], "makes no sense"),
        (b"\xfe\xff\n", "makes no sense"),
        (b"{}", "neither a result nor an error"),
        (b"{\"return\": null}", "neither a result nor an error"),
        (&deep, "makes no sense"),
        (&long, "longer than"),
    ] {
        let peer = Peer::new([("status", Act::Say(answer.to_vec()))]);
        let mut connection = Connection::open(&peer.socket, PATIENCE).await.unwrap();
        let trouble = connection.ask(Command::Status, PATIENCE).await.unwrap_err().to_string();
        assert!(trouble.contains(words), "{trouble}");
        // What comes next could be anything.
        assert!(!connection.is_in_step());
        assert!(connection.ask(Command::Status, PATIENCE).await.is_err());
        drop(connection);
        assert_eq!(ask(&peer).await.unwrap(), "thawed");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_in_its_own_words_and_the_connection_goes_on() {
    let peer = Peer::new([("status", Act::Refuse("disabled\u{1b}[2J for this instance"))]);
    let mut connection = Connection::open(&peer.socket, PATIENCE).await.unwrap();
    let trouble = connection.ask(Command::Status, PATIENCE).await.unwrap_err().to_string();
    assert_eq!(trouble, "guest-fsfreeze-status was refused: disabled [2J for this instance");
    assert_eq!(connection.ask(Command::Status, PATIENCE).await.unwrap(), "thawed");
}

#[tokio::test(start_paused = true)]
async fn every_wait_ends() {
    let peer = Peer::new([("delimited", Act::Mute), ("status", Act::Mute)]);
    let silent = ask(&peer).await.unwrap_err().to_string();
    assert_eq!(silent, "no answer to guest-sync-delimited within 5s");
    let silent = ask(&peer).await.unwrap_err().to_string();
    assert_eq!(silent, "no answer to guest-fsfreeze-status within 5s");
    let peer = Peer::new([("status", Act::Close)]);
    assert!(matches!(ask(&peer).await, Err(Trouble::Broken(_))));
    std::fs::remove_file(&peer.socket).unwrap();
    assert!(matches!(ask(&peer).await, Err(Trouble::Absent(_))));
    // An endless line without the sentinel is thrown away as it comes.
    let peer = Peer::new([("delimited", Act::Say(vec![b'x'; 8 << 20]))]);
    assert!(matches!(ask(&peer).await, Err(Trouble::Silent { .. })));
}
