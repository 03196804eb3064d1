//! A message is done or dead, never both, never neither.

use oncely::store::{Claimed, FailedAttempt, LetterFilter};
use oncely::verdict::Reason;

use super::{WORKER, World, a_claim, a_letter};

on_every_database!(
    a_letter_is_buried_once_with_its_notice,
    what_is_done_cannot_be_buried,
    a_reused_event_id_is_buried_beside_what_holds_it,
    a_letter_shows_its_story,
    letters_are_listed_newest_first_by_worker_and_reason,
    a_note_counts_until_it_is_taken_back,
);

fn all() -> LetterFilter {
    LetterFilter { limit: 100, ..LetterFilter::default() }
}

async fn a_letter_is_buried_once_with_its_notice(world: World) {
    let letters = [a_letter("e1", b"body", Reason::Rejected), a_letter("e2", b"body", Reason::Rejected)];
    let (settled, notices) = world.store.bury(&letters).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 2));
    assert_eq!(notices[0].id, letters[0].1.id);
    let (settled, notices) = world.store.bury(&[letters[0].clone(), letters[0].clone()]).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 0));
    let (_, notices) = world.store.bury(&vec![a_letter("e3", b"body", Reason::Rejected); 2]).await.unwrap();
    assert_eq!(notices.len(), 1);
    assert_eq!(world.store.letters(&all()).await.unwrap().len(), 3);
    assert!(world.store.lease_outputs(100, super::LEASE).await.unwrap().is_empty());
    let mut tx = world.begin().await;
    let mut claim = a_claim("e1", 0);
    claim.payload_sha256 = letters[0].0.message.payload_sha256();
    assert!(matches!(tx.claim(&[claim]).await.unwrap()[0], Claimed::Settled(_)));
    tx.rollback().await;
}

async fn what_is_done_cannot_be_buried(world: World) {
    let letter = a_letter("e1", b"body", Reason::AttemptsExhausted);
    let mut claim = a_claim("e1", 0);
    claim.payload_sha256 = letter.0.message.payload_sha256();
    let mut tx = world.begin().await;
    tx.claim(&[claim]).await.unwrap();
    tx.commit().await.unwrap();
    let (settled, notices) = world.store.bury(&[letter]).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (1, 0));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead), (1, 0));
}

async fn a_reused_event_id_is_buried_beside_what_holds_it(world: World) {
    let mut tx = world.begin().await;
    tx.claim(&[a_claim("e1", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    let reuse = [a_letter("e1", b"one", Reason::IdReuse), a_letter("e1", b"two", Reason::IdReuse)];
    assert_eq!(world.store.bury(&reuse).await.unwrap().1.len(), 2);
    assert_eq!(world.store.bury(&reuse).await.unwrap().1.len(), 0);
    assert!(matches!(world.look("e1", 1).await, Claimed::Settled(_)));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead), (1, 2));
}

async fn a_letter_shows_its_story(world: World) {
    let attempt = |error: &str| FailedAttempt {
        event_id: "e1".to_owned(),
        version: 3,
        code: Some("card-declined".to_owned()),
        error: error.to_owned(),
        logs: "line".to_owned(),
    };
    world.store.count_attempts(WORKER, &[attempt("first")]).await.unwrap();
    world.store.count_attempts(WORKER, &[attempt("second")]).await.unwrap();
    let (buried, notice) = a_letter("e1", b"\x00\xff", Reason::AttemptsExhausted);
    world.store.bury(&[(buried.clone(), notice)]).await.unwrap();
    let id = world.store.letters(&all()).await.unwrap()[0].id;
    let letter = world.store.letter(id).await.unwrap().unwrap();
    assert_eq!((letter.headers, letter.body), (buried.message.headers, buried.message.body));
    assert_eq!(letter.origin, Some(("ORDERS".to_owned(), 9)));
    assert_eq!((letter.summary.reason.as_str(), letter.summary.attempts), ("attempts-exhausted", 2));
    assert_eq!(letter.summary.detail, "the card was declined\u{fffd}");
    let story: Vec<_> = letter.attempts.iter().map(|attempt| (attempt.attempt, attempt.error.as_str())).collect();
    assert_eq!(story, [(1, "first"), (2, "second")]);
    assert!(world.store.letter(id + 1).await.unwrap().is_none());
}

async fn letters_are_listed_newest_first_by_worker_and_reason(world: World) {
    for (event_id, reason) in [("e1", Reason::Rejected), ("e2", Reason::IdReuse), ("e3", Reason::Rejected)] {
        world.store.bury(&[a_letter(event_id, b"", reason)]).await.unwrap();
    }
    let ids = async |filter: LetterFilter| {
        let letters = world.store.letters(&filter).await.unwrap();
        letters.into_iter().map(|letter| letter.event_id).collect::<Vec<_>>()
    };
    assert_eq!(ids(all()).await, ["e3", "e2", "e1"]);
    assert_eq!(ids(LetterFilter { limit: 2, ..all() }).await, ["e3", "e2"]);
    assert_eq!(ids(LetterFilter { reason: Some("rejected".to_owned()), ..all() }).await, ["e3", "e1"]);
    assert_eq!(ids(LetterFilter { worker: Some("another".to_owned()), ..all() }).await, [""; 0]);
}

async fn a_note_counts_until_it_is_taken_back(world: World) {
    for before in 0..3 {
        assert_eq!(world.store.note_unfinished(WORKER, "e1").await.unwrap(), before);
    }
    assert_eq!(world.store.note_unfinished("another", "e1").await.unwrap(), 0);
    world.store.take_back_unfinished(WORKER, "e1").await.unwrap();
    assert_eq!(world.store.note_unfinished(WORKER, "e1").await.unwrap(), 0);
}
