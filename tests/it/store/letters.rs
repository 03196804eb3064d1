//! A message is done or dead, never both, never neither.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oncely::model::message::Redriven;
use oncely::model::verdict::{Letter, Reason};
use oncely::store::{By, Claim, Claimed, FailedAttempt, LetterFilter, LetterState, Move, PutBack, Redrive};

use super::retention::retire_everything;
use super::{WORKER, World, a_claim, a_letter};

on_every_database!(
    a_letter_is_buried_once_with_its_notice,
    what_is_done_cannot_be_buried,
    a_reused_event_id_is_buried_beside_what_holds_it,
    a_letter_shows_its_story,
    letters_are_listed_newest_first_by_worker_and_reason,
    a_letter_is_put_back_once_by_two_who_try,
    what_was_put_back_is_read_until_it_is_out_of_date,
    a_dead_letter_is_read_for_its_own_worker_alone,
    a_letter_that_dies_again_is_the_same_letter,
    what_was_put_back_keeps_its_event_id_from_other_bodies,
    a_letter_under_way_is_closed_only_if_it_did_not_take_effect,
    a_note_counts_until_it_is_taken_back,
);

fn all() -> LetterFilter {
    LetterFilter { limit: 100, ..LetterFilter::default() }
}

async fn a_letter_is_buried_once_with_its_notice(world: World) {
    let letters = [a_letter("e1", b"body", Reason::Rejected), a_letter("e2", b"body", Reason::Rejected)];
    let (settled, notices) = world.bury(&letters).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 2));
    assert_eq!(notices[0].output_id(), letters[0].1.id);
    let (settled, notices) = world.bury(&[letters[0].clone(), letters[0].clone()]).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 0));
    let (_, notices) = world.bury(&vec![a_letter("e3", b"body", Reason::Rejected); 2]).await.unwrap();
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
    let (settled, notices) = world.bury(&[letter]).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (1, 0));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead), (1, 0));
}

async fn a_reused_event_id_is_buried_beside_what_holds_it(world: World) {
    let mut tx = world.begin().await;
    tx.claim(&[a_claim("e1", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    let reuse = [a_letter("e1", b"one", Reason::IdReuse), a_letter("e1", b"two", Reason::IdReuse)];
    assert_eq!(world.bury(&reuse).await.unwrap().1.len(), 2);
    assert_eq!(world.bury(&reuse).await.unwrap().1.len(), 0);
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
        record: None,
    };
    world.store.count_attempts(WORKER, &[attempt("first")]).await.unwrap();
    world.store.count_attempts(WORKER, &[attempt("second")]).await.unwrap();
    let (buried, notice) = a_letter("e1", b"\x00\xff", Reason::AttemptsExhausted);
    world.bury(&[(buried.clone(), notice)]).await.unwrap();
    let id = world.store.letters(&all()).await.unwrap()[0].id;
    let letter = world.store.letter(id).await.unwrap().unwrap();
    assert_eq!((letter.headers, letter.body), (buried.message.headers, buried.message.body));
    assert_eq!((letter.summary.stream.as_deref(), letter.summary.stream_sequence), (Some("ORDERS"), Some(9)));
    assert_eq!((letter.summary.reason.as_str(), letter.summary.attempts), ("attempts-exhausted", 2));
    assert_eq!(letter.summary.detail, "the card was declined\u{fffd}");
    let story: Vec<_> = letter.attempts.iter().map(|attempt| (attempt.attempt, attempt.error.as_str())).collect();
    assert_eq!(story, [(1, "first"), (2, "second")]);
    assert!(world.store.letter(id + 1).await.unwrap().is_none());
}

async fn letters_are_listed_newest_first_by_worker_and_reason(world: World) {
    for (event_id, reason) in [("e1", Reason::Rejected), ("e2", Reason::IdReuse), ("e3", Reason::Rejected)] {
        world.bury(&[a_letter(event_id, b"", reason)]).await.unwrap();
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

fn ada() -> By {
    By { actor: "ada".to_owned(), note: Some("why".to_owned()) }
}

fn back(id: i64) -> Redrive {
    Redrive { id, generation: None, again: false }
}

/// Buries a letter for `e1` and returns its id and how its event is claimed once that was put back.
async fn buried(world: &World) -> (i64, Claim) {
    let letter = a_letter("e1", b"body", Reason::Rejected);
    let payload_sha256 = letter.0.message.payload_sha256();
    world.bury(&[letter]).await.unwrap();
    let id = world.store.letters(&all()).await.unwrap()[0].id;
    (id, Claim { payload_sha256, redriven: true, ..a_claim("e1", 0) })
}

async fn state(world: &World, id: i64) -> LetterState {
    world.store.letter(id).await.unwrap().unwrap().summary.state
}

async fn a_letter_is_put_back_once_by_two_who_try(world: World) {
    let (id, claim) = buried(&world).await;
    let (one, other) = tokio::join!(async { world.store.redrive(&[back(id)], &ada()).await.unwrap() }, async {
        world.store.redrive(&[back(id)], &ada()).await.unwrap()
    });
    let mut refused: Vec<_> = [&one, &other].iter().map(|(moved, _)| moved[0].refused.clone()).collect();
    refused.sort();
    assert_eq!(refused, [None, Some("it was put back and is under way".to_owned())]);
    let rows: Vec<_> = one.1.into_iter().chain(other.1).collect();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].output_id(), rows[0].subject.as_str()), ("payments:e1:r1", "oncely.redrive.payments"));
    let mut tx = world.begin().await;
    assert!(matches!(tx.claim(&[claim]).await.unwrap()[0], Claimed::Fresh { .. }));
    tx.rollback().await;
    let (moved, _) = world.store.redrive(&[Redrive { generation: Some(7), again: true, id }], &ada()).await.unwrap();
    assert_eq!(moved[0].refused.as_deref(), Some("somebody put it back since"));
    let (moved, _) = world.store.redrive(&[back(999)], &ada()).await.unwrap();
    assert_eq!(moved[0].refused.as_deref(), Some("there is no such letter"));
    let audit = world.store.letter(id).await.unwrap().unwrap().audit;
    assert_eq!((audit.len(), audit[0].actor.as_str(), audit[0].note.as_deref()), (1, "ada", Some("why")));
}

async fn what_was_put_back_is_read_until_it_is_out_of_date(world: World) {
    let (id, claim) = buried(&world).await;
    let attempt = FailedAttempt {
        event_id: "e1".to_owned(),
        version: 3,
        code: None,
        error: "no".to_owned(),
        logs: String::new(),
        record: None,
    };
    world.store.count_attempts(WORKER, &[attempt.clone(), attempt]).await.unwrap();
    assert!(matches!(world.store.put_back(WORKER, id, 0).await.unwrap(), PutBack::OutOfDate(_)));
    world.store.move_letters(&[id], &Move::Edit(Bytes::from_static(b"better")), &ada()).await.unwrap();
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    let found = world.store.put_back(WORKER, id, 1).await.unwrap();
    let PutBack::Message(message, _) = found else { panic!("it is out of date") };
    assert_eq!((message.event_id.as_str(), message.body.as_ref()), ("e1", &b"better"[..]));
    assert_eq!(message.payload_sha256(), claim.payload_sha256);
    assert_eq!(message.attempts_before(), 2);
    assert_eq!(message.origin, a_letter("e1", b"body", Reason::Rejected).0.message.origin);
    let edit = world.store.move_letters(&[id], &Move::Edit(Bytes::new()), &ada()).await.unwrap();
    assert_eq!(edit[0].refused.as_deref(), Some("it was put back and is under way"));
    world.store.redrive(&[Redrive { again: true, ..back(id) }], &ada()).await.unwrap();
    assert!(matches!(world.store.put_back(WORKER, id, 1).await.unwrap(), PutBack::OutOfDate(_)));
    assert!(matches!(world.store.put_back(WORKER, id, 2).await.unwrap(), PutBack::Message(..)));
}

async fn a_dead_letter_is_read_for_its_own_worker_alone(world: World) {
    let (id, _) = buried(&world).await;
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    for other in ["other", "payment", "payments ", "PAYMENTS", "%", ""] {
        assert!(matches!(world.store.put_back(other, id, 1).await.unwrap(), PutBack::OutOfDate(_)), "{other}");
    }
    assert!(matches!(world.store.put_back(WORKER, id, 1).await.unwrap(), PutBack::Message(..)));
}

async fn a_letter_that_dies_again_is_the_same_letter(world: World) {
    let (id, _) = buried(&world).await;
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    let mut again = a_letter("e1", b"body", Reason::AttemptsExhausted);
    again.0.attempts = 4;
    again.0.message.redriven = put_back(&again.0);
    let (_, notices) = world.bury(&[again.clone()]).await.unwrap();
    assert_eq!(notices[0].output_id(), format!("{}:r1", again.1.id));
    let letters = world.store.letters(&all()).await.unwrap();
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!((letter.id, letter.state, letter.generation), (id, LetterState::Open, 1));
    assert_eq!((letter.reason.as_str(), letter.attempts), ("attempts-exhausted", 4));
    assert!(world.store.letter(id).await.unwrap().unwrap().first_died_at.unwrap() <= letter.died_at);
    // What still points to it is out of date, and burying it again adds nothing.
    assert!(matches!(world.store.put_back(WORKER, id, 1).await.unwrap(), PutBack::OutOfDate(_)));
    assert_eq!(world.bury(&[again]).await.unwrap().1.len(), 0);
}

async fn what_was_put_back_keeps_its_event_id_from_other_bodies(world: World) {
    let (id, claim) = buried(&world).await;
    let claimed = |claim: Claim| {
        let world = &world;
        async move {
            let mut tx = world.begin().await;
            let claimed = tx.claim(&[claim]).await.unwrap().remove(0);
            tx.rollback().await;
            claimed
        }
    };
    let copy = || Claim { redriven: false, ..claim.clone() };
    let other = || Claim { payload_sha256: [9; 32], ..copy() };
    // What is dead and was not put back is claimed by nobody, whatever they say of themselves.
    assert!(matches!(claimed(claim.clone()).await, Claimed::Settled(_)));
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    for failed_before in [false, true] {
        if failed_before {
            // Its neighbours in the batch take effect, it does not.
            let mut tx = world.begin().await;
            let claims = [a_claim("e2", 1), claim.clone()];
            assert!(tx.claim(&claims).await.unwrap().iter().all(|claimed| matches!(claimed, Claimed::Fresh { .. })));
            tx.unclaim(&["e1".to_owned()]).await.unwrap();
            tx.commit().await.unwrap();
        }
        assert!(matches!(claimed(other()).await, Claimed::OtherPayload));
        assert!(matches!(claimed(copy()).await, Claimed::Settled(_)));
        assert!(matches!(claimed(claim.clone()).await, Claimed::Fresh { .. }));
    }
    // Nor can another body be buried in its place, or a copy of it.
    world
        .bury(&[a_letter("e1", b"other", Reason::InvalidId), a_letter("e1", b"body", Reason::InvalidId)])
        .await
        .unwrap();
    assert_eq!(state(&world, id).await, LetterState::Redriven);
    assert!(matches!(claimed(claim.clone()).await, Claimed::Fresh { .. }));
    let mut tx = world.begin().await;
    tx.claim(std::slice::from_ref(&claim)).await.unwrap();
    tx.commit().await.unwrap();
    let mut late = a_letter("e1", b"body", Reason::AttemptsExhausted);
    late.0.message.redriven = put_back(&late.0);
    assert_eq!(world.bury(&[late]).await.unwrap().1.len(), 0, "what took effect is dead, too");
    assert!(matches!(claimed(claim.clone()).await, Claimed::Settled(_)));
}

/// That a letter's message was put back.
fn put_back(letter: &Letter) -> Option<Redriven> {
    Some(Redriven { attempts_before: 0, payload_sha256: letter.message.payload_sha256() })
}

async fn a_letter_under_way_is_closed_only_if_it_did_not_take_effect(world: World) {
    let (id, claim) = buried(&world).await;
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    // Somebody handles it: who closes the letter waits for what comes of that.
    let mut tx = world.begin().await;
    tx.claim(std::slice::from_ref(&claim)).await.unwrap();
    let store = Arc::clone(&world.store);
    let closing = tokio::spawn(async move { store.move_letters(&[id], &Move::Drop, &ada()).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(100)).await;
    tx.commit().await.unwrap();
    assert_eq!(closing.await.unwrap()[0].refused.as_deref(), Some("it took effect since; nothing is to be done"));
    assert_eq!(state(&world, id).await, LetterState::Done);
    assert!(world.store.letters(&all()).await.unwrap().is_empty());
    // It is written down before the inbox forgets it.
    retire_everything(&world).await;
    assert_eq!(state(&world, id).await, LetterState::Done);

    let other = a_letter("e2", b"body", Reason::Rejected);
    world.bury(&[other]).await.unwrap();
    let id = world.store.letters(&all()).await.unwrap()[0].id;
    world.store.redrive(&[back(id)], &ada()).await.unwrap();
    assert_eq!(world.store.move_letters(&[id], &Move::Resolve, &ada()).await.unwrap()[0].refused, None);
    assert_eq!(state(&world, id).await, LetterState::Resolved);
    assert!(matches!(world.store.put_back(WORKER, id, 1).await.unwrap(), PutBack::OutOfDate(_)));
    let mut tx = world.begin().await;
    let claim = Claim { event_id: "e2".to_owned(), ..claim };
    assert!(matches!(tx.claim(&[claim]).await.unwrap()[0], Claimed::Settled(_)));
    tx.rollback().await;
}
