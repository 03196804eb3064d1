//! What must have happened in a campaign before it may say that a mutant was not caught: otherwise it proves nothing.

use support::proxy::Cut;

use crate::campaign::Act;
use crate::workload::{Nature, Often};

/// What a mutant cannot survive unseen.
#[derive(Debug, Clone, Default)]
pub struct Exposure {
    /// What is done to the host, and how often at least.
    pub acts: Vec<(Act, u64)>,
    /// What is published far more often than usual, and how often at least.
    pub often: Option<(Often, u64)>,
    /// How often ids of outputs are taken by a stranger before these are published.
    pub taken_ids: u64,
    /// How often the mutant has to have done harm that it knows of. The acts go on until then.
    pub harm: u64,
}

impl Exposure {
    /// What exposes a mutant; none for one that no campaign is made for. The host as it is (`none`) goes through the acts
    /// of all of them.
    pub fn for_mutant(mutant: &str) -> Option<Exposure> {
        let acts = |acts: &[(Act, u64)]| Exposure {
            acts: acts.to_vec(),
            ..Exposure::default()
        };
        let often = |often, times| Exposure {
            often: Some((often, times)),
            ..Exposure::default()
        };
        Some(match mutant {
            // What is in flight when a host dies is gone.
            "ack_before_commit" | "inbox_in_own_tx" => acts(&[(Act::Kill, 6)]),
            // The commit did not happen, and succeeds on another connection.
            "resend_commit" => acts(&[(Act::Cut(Cut::CommitNotForwarded), 6)]),
            // The commit happens after the look for it.
            "resolve_by_select" => Exposure {
                harm: 2,
                ..acts(&[(Act::Cut(Cut::CommitDelayed), 4)])
            },
            // What was confirmed last is gone with the server, which writes seconds later where it is not waited for.
            "synchronous_commit_off" => acts(&[(Act::StopDatabase, 6)]),
            // Outputs are left behind, to be swept up.
            "cursor_by_seq" => acts(&[(Act::Cut(Cut::OutputsNotForwarded), 4), (Act::Kill, 2)]),
            // Outputs are marked and did not arrive.
            "mark_before_puback" | "mark_without_filter" => acts(&[
                (Act::Cut(Cut::OutputsNotForwarded), 5),
                (Act::KillBroker, 2),
            ]),
            // Copies are common enough, and every effect leaves a trace in its session.
            "skip_claim" | "no_session_reset" => Exposure::default(),
            "skip_release" => often(Often::Nature(Nature::FailsOnce), 20),
            "charge_whole_batch" => often(Often::Nature(Nature::FailsOnceLate), 20),
            "ignore_commit_tag" => often(Often::Nature(Nature::Swallows), 15),
            "reuse_after_trap" => often(Often::Nature(Nature::Trap), 15),
            "skip_dead_letter" => often(Often::Nature(Nature::Malformed), 15),
            "allow_reserved_headers" => often(Often::Nature(Nature::ReservedHeader), 15),
            "trust_duplicate" => Exposure {
                taken_ids: 20,
                ..Exposure::default()
            },
            // The stranger sends each pointer to another worker, too.
            "pointer_without_worker" => often(Often::Nature(Nature::Redriven), 20),
            // What a host leaves waits until its leases run out.
            "leases_without_instance" => acts(&[(Act::DieWithLeases, 3)]),
            "drop_payload_hash" => often(Often::IdReuse, 15),
            "none" => acts(&[
                (Act::Kill, 3),
                (Act::StopDatabase, 3),
                (Act::KillBroker, 2),
                (Act::Cut(Cut::CommitNotForwarded), 4),
                (Act::Cut(Cut::CommitDelayed), 4),
                (Act::Cut(Cut::OutputsNotForwarded), 4),
            ]),
            _ => return None,
        })
    }
}
